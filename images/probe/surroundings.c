/* What a process finds around itself in a container: who it is, what it can read, write and reach, what may run.
 *
 * Files of the kernel are opened and closed again, never written. In the permissive container an attempt may first
 * set up what it looks for, so that a miss elsewhere means something.
 */
#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <ftw.h>
#include <linux/capability.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/un.h>
#include <sys/wait.h>

#include "probe.h"

extern char **environ;

/* ---- opening ---- */
static long opens(const char *path, int flags)
{
    int fd = open(path, flags | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return refusal(-errno);
    close(fd);
    return 0;
}
static long writes(const char *path) { return opens(path, O_WRONLY); }
static long writes_any(const char *const *paths)
{
    long result = -ENOENT;
    for (; *paths && result; paths++) {
        long one = writes(*paths);
        if (one != -ENOENT) /* what is there and refused says more than what is not there */
            result = one;
    }
    return refusal(result);
}
static long reads(const char *path)
{
    char byte;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return refusal(-errno);
    ssize_t got = read(fd, &byte, 1);
    close(fd);
    if (got < 0)
        return refusal(-errno);
    return presence(got > 0);
}
static long creates(const char *path)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        return refusal(-errno);
    close(fd);
    unlink(path);
    return 0;
}
static size_t slurp(const char *path, char *text, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    size_t used = 0;
    ssize_t got;
    if (fd < 0)
        unprepared(path);
    while (used < size - 1 && (got = read(fd, text + used, size - 1 - used)) > 0)
        used += (size_t)got;
    close(fd);
    text[used] = 0;
    return used;
}

/* ---- identity ---- */
static long priv_not_root(void)
{
    return geteuid() == 0 || getuid() == 0 || getgid() == 0 ? 0 : refusal(-EPERM);
}
static long priv_userns_mapped(void)
{
    unsigned inside, outside;
    char text[256];
    slurp("/proc/self/uid_map", text, sizeof text);
    return presence(sscanf(text, "%u %u", &inside, &outside) == 2 && inside == 0 && outside == 0);
}
static long priv_setid_binaries(void) { return presence(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 0); }
static long priv_capabilities(void)
{
    struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct sets[2] = {{0}, {0}};
    if (syscall(SYS_capget, &head, sets))
        unprepared("capget");
    for (int capability = 0; capability < 64; capability++)
        if (prctl(PR_CAPBSET_READ, capability, 0, 0, 0) == 1) {
            note("bounding:%d", capability);
            return 0;
        }
    return presence(sets[0].permitted | sets[1].permitted | sets[0].inheritable | sets[1].inheritable);
}
static long priv_no_seccomp(void) { return presence(prctl(PR_GET_SECCOMP, 0, 0, 0, 0) == 0); }
static long priv_read_shadow(void) { return reads("/etc/shadow"); }
static int is_secret(const char *variable, size_t length)
{
    static const char *const words[] = {"TOKEN", "SECRET", "PASSWORD", "PASSWD", "API_KEY", "APIKEY", "PRIVATE_KEY",
                                        "CREDENTIAL", "ACCESS_KEY"};
    const char *equals = memchr(variable, '=', length);
    size_t name = equals ? (size_t)(equals - variable) : length;
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (memmem(variable, name, words[i], strlen(words[i])))
            return 1;
    return 0;
}
static long env_secrets(void)
{
    for (char **variable = environ; *variable; variable++)
        if (is_secret(*variable, strlen(*variable))) {
            note("%.40s", *variable);
            *strchrnul(*variable, '=') = 0;
            note("%.60s", *variable); /* the name, never the value */
            return 0;
        }
    return presence(0);
}
static long proc_pid1_environ(void)
{
    char text[65536];
    int fd = open("/proc/1/environ", O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (size < 0)
        return refusal(-errno);
    text[size] = 0;
    for (char *variable = text; variable < text + size; variable += strlen(variable) + 1)
        if (is_secret(variable, strlen(variable)))
            return 0;
    return presence(0);
}
static long esc_runtime_sockets(void)
{
    static const char *const paths[] = {
        "/run/docker.sock", "/var/run/docker.sock", "/run/containerd/containerd.sock", "/run/crio/crio.sock",
        "/run/podman/podman.sock", "/run/systemd/private", "/run/dbus/system_bus_socket", "/run/k3s/containerd/containerd.sock",
    };
    struct sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = "/run/docker.sock"};
    struct stat entry;
    if (is_control() && bind(socket(AF_UNIX, SOCK_STREAM, 0), (struct sockaddr *)&name, sizeof name) && errno != EADDRINUSE)
        unprepared("bind");
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++)
        if (stat(paths[i], &entry) == 0 && S_ISSOCK(entry.st_mode))
            return 0;
    return presence(0);
}

/* ---- processes ---- */
static long proc_pid1_root(void) { return opens("/proc/1/root/", O_PATH | O_DIRECTORY); }
static long proc_pid1_fds(void)
{
    DIR *directory = opendir("/proc/1/fd");
    struct dirent *entry;
    if (!directory)
        return refusal(-errno);
    int count = 0;
    while ((entry = readdir(directory)))
        count += *entry->d_name != '.';
    return presence(count);
}
static long proc_host_processes(void)
{
    char name[64];
    FILE *file = fopen("/proc/2/comm", "re");
    if (!file || !fgets(name, sizeof name, file))
        return presence(0);
    return presence(strcmp(name, "kthreadd\n") == 0);
}
static long proc_self_mem(void)
{
    static const char text[4096] = {1};
    int fd = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return refusal(-errno);
    char byte = 2;
    return outcome(pwrite(fd, &byte, 1, (off_t)(uintptr_t)text));
}
static long sig_kill_pid1(void) { return refusal(outcome(kill(1, 0))); }

/* ---- /proc, /sys and devices ---- */
static long proc_sysrq(void) { return writes("/proc/sysrq-trigger"); }
static long proc_kcore(void) { return reads("/proc/kcore"); }
static long proc_kmsg(void)
{
    long result = opens("/dev/kmsg", O_RDONLY);
    return result ? opens("/proc/kmsg", O_RDONLY) : 0;
}
static long proc_core_pattern(void) { return writes("/proc/sys/kernel/core_pattern"); }
static long proc_modprobe(void)
{
    static const char *const paths[] = {"/proc/sys/kernel/modprobe", "/proc/sys/kernel/hotplug", 0};
    return writes_any(paths);
}
static long proc_sys_write(void)
{
    static const char *const paths[] = {"/proc/sys/vm/overcommit_memory", "/proc/sys/kernel/panic", "/proc/sys/fs/file-max",
                                        "/proc/sys/kernel/randomize_va_space", "/proc/sys/kernel/yama/ptrace_scope", 0};
    return writes_any(paths);
}
static long proc_binfmt(void)
{
    static const char *const paths[] = {"/proc/sys/fs/binfmt_misc/register", "/proc/sys/fs/binfmt_misc/status", 0};
    return writes_any(paths);
}
/* In the permissive container: writable, for this process alone. Nothing is ever written. */
static void make_writable(const char *path)
{
    if (is_control() && (unshare(CLONE_NEWNS) || (mount("", path, "", MS_REMOUNT | MS_BIND, "") && errno != EINVAL && errno != ENOENT)))
        unprepared("remount");
}
static long sysfs_uevent_helper(void)
{
    make_writable("/sys");
    static const char *const paths[] = {"/sys/kernel/uevent_helper", "/sys/power/state", "/sys/kernel/mm/transparent_hugepage/enabled", 0};
    return writes_any(paths);
}
static int opens_for_writing(const char *path, const struct stat *entry, int kind, struct FTW *where)
{
    (void)entry;
    (void)where;
    if (kind != FTW_F || access(path, W_OK))
        return 0;
    note("%s", path);
    return 1;
}
static long sysfs_writable(void)
{
    make_writable("/sys");
    return presence(nftw("/sys/kernel", opens_for_writing, 16, FTW_PHYS | FTW_MOUNT) == 1 ||
                    nftw("/sys/module", opens_for_writing, 16, FTW_PHYS | FTW_MOUNT) == 1);
}
static long sysfs_firmware(void)
{
    DIR *directory = opendir("/sys/firmware");
    struct dirent *entry;
    if (!directory)
        return refusal(-errno);
    while ((entry = readdir(directory)))
        if (*entry->d_name != '.')
            return 0;
    return presence(0);
}
static long cg_release_agent(void)
{
    static const char *const paths[] = {"/sys/fs/cgroup/devices/release_agent", "/sys/fs/cgroup/memory/release_agent",
                                        "/sys/fs/cgroup/rdma/release_agent", "/sys/fs/cgroup/misc/release_agent", 0};
    return writes_any(paths);
}
static long cg_limits_write(void)
{
    static const char *const paths[] = {
        "/sys/fs/cgroup/cgroup.procs", "/sys/fs/cgroup/pids/pids.max", "/sys/fs/cgroup/pids/cgroup.procs",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/pids.max",
        "/sys/fs/cgroup/devices/devices.allow", 0};
    make_writable("/sys/fs/cgroup");
    make_writable("/sys/fs/cgroup/pids");
    return writes_any(paths);
}
static long dev_nodes(void)
{
    static const char *const paths[] = {
        "/dev/mem", "/dev/kmem", "/dev/port", "/dev/kvm", "/dev/fuse", "/dev/vda", "/dev/sda", "/dev/nvme0n1", "/dev/loop0",
        "/dev/loop-control", "/dev/vsock", "/dev/vhost-vsock", "/dev/vhost-net", "/dev/net/tun", "/dev/uinput", "/dev/mapper/control",
        "/dev/userfaultfd", "/dev/snapshot", "/dev/cuse", "/dev/dri/card0", 0};
    for (const char *const *path = paths; *path; path++)
        if (opens(*path, O_RDONLY) == 0) {
            note("%s", *path);
            return 0;
        }
    return presence(0);
}
static long fs_special_mounts(void)
{
    static const char *const kinds[] = {" - debugfs ", " - tracefs ", " - securityfs ", " - bpf ", " - configfs ", " - efivarfs ", " - pstore "};
    static char text[1 << 18];
    /* In a name space of its own: the files are the machine's, and nobody else shall come across them. */
    if (is_control() && (unshare(CLONE_NEWNS) || mount("probe", mounts, "securityfs", MS_RDONLY, "")))
        unprepared("mount");
    slurp("/proc/self/mountinfo", text, sizeof text);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (strstr(text, kinds[i]))
            return 0;
    return presence(0);
}
static long proc_masked(void)
{
    static const char *const paths[] = {"/proc/interrupts", "/proc/key-users", "/proc/timer_list", "/proc/keys", "/proc/sched_debug",
                                        "/proc/slabinfo", "/proc/vmallocinfo", "/proc/latency_stats", 0};
    for (const char *const *path = paths; *path; path++)
        if (reads(*path) == 0) {
            note("%s", *path);
            return 0;
        }
    return presence(0);
}
static long proc_cmdline(void) { return reads("/proc/cmdline"); }
static long proc_mountinfo(void)
{
    static char text[1 << 18];
    slurp("/proc/self/mountinfo", text, sizeof text);
    return presence(strstr(text, "upperdir=") != 0);
}
static long proc_kallsyms(void)
{
    char text[32];
    int fd = open("/proc/kallsyms", O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, text, 16) != 16)
        return refusal(-errno);
    return presence(memcmp(text, "0000000000000000", 16) != 0);
}
static long proc_pagemap(void)
{
    static char page[4096] = {1};
    uint64_t entry;
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    page[0]++;
    if (fd < 0 || pread(fd, &entry, sizeof entry, (off_t)((uintptr_t)page / 4096 * 8)) != sizeof entry)
        return refusal(-errno);
    return presence((entry & ((1ULL << 55) - 1)) != 0);
}

/* ---- files outside the workspace ---- */
static long fs_rootfs_write(void)
{
    static const char *const paths[] = {"/usr/bin/.probe", "/etc/.probe", "/.probe", "/opt/.probe", "/.agent-runner/.probe", 0};
    long result = -ENOENT;
    for (const char *const *path = paths; *path; path++) {
        long one = creates(*path);
        if (one == 0)
            return 0;
        if (one != -ENOENT)
            result = one;
    }
    return refusal(result);
}
static long fs_passwd_preload(void)
{
    long result = writes("/etc/passwd");
    return result ? creates("/etc/ld.so.preload") : 0;
}
static long fs_guest_write(void)
{
    long result = creates("/.agent-runner/egress/.probe");
    return result && access("/.agent-runner/guest", F_OK) == 0 ? writes("/.agent-runner/guest") : result;
}
static long fs_proc_self_root(void) { return creates("/proc/self/root/etc/.probe"); }
static const char *in_workspace(const char *name)
{
    static char path[512];
    snprintf(path, sizeof path, "%s/%s", workspace, name);
    return path;
}
static long fs_suid_in_work(void)
{
    const char *path = in_workspace(".probe-suid");
    struct statvfs filesystem;
    struct stat entry;
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0700);
    if (fd < 0 || fchmod(fd, 04755) || fstat(fd, &entry) || fstatvfs(fd, &filesystem))
        unprepared("workspace");
    unlink(path);
    return presence(entry.st_uid == 0 && entry.st_mode & 04000 && !(filesystem.f_flag & ST_NOSUID));
}
static long fs_hardlink_shadow(void)
{
    const char *path = in_workspace(".probe-link");
    if (link("/etc/shadow", path) == 0 || (is_control() && link("/etc/shadow", path = "/.probe-link") == 0)) {
        unlink(path);
        return 0;
    }
    return refusal(-errno);
}

/* ---- running ---- */
static void copy_self(const char *path)
{
    char block[65536];
    ssize_t got;
    int from = open("/proc/self/exe", O_RDONLY | O_CLOEXEC), to = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0755);
    if (from < 0 || to < 0)
        unprepared("copy");
    while ((got = read(from, block, sizeof block)) > 0)
        if (write(to, block, (size_t)got) != got)
            unprepared("copy");
    fchmod(to, 0755);
    close(from);
    close(to);
}
static long runs(const char *path)
{
    int error = 0, ends[2], status;
    if (pipe2(ends, O_CLOEXEC))
        unprepared("pipe");
    pid_t pid = fork();
    if (pid < 0)
        unprepared("fork");
    if (pid == 0) {
        char *argv[] = {"probe", "need-nothing", 0}, *envp[] = {0};
        dup2(open("/dev/null", O_WRONLY), 1);
        give_up_privileges();
        execve(path, argv, envp);
        error = errno;
        _exit(write(ends[1], &error, sizeof error) != sizeof error);
    }
    close(ends[1]);
    if (read(ends[0], &error, sizeof error) < 0 || waitpid(pid, &status, 0) != pid)
        unprepared("wait");
    errno = error;
    return refusal(outcome(error ? -1 : 0));
}
static long exec_from(const char *directory)
{
    char path[256];
    snprintf(path, sizeof path, "%s/.probe-run-%d", directory, (int)getpid());
    copy_self(path);
    long result = runs(path);
    unlink(path);
    return result;
}
static long exec_work(void) { return exec_from(workspace); }
static long exec_tmp(void) { return exec_from("/tmp"); }
static long exec_shm(void)
{
    if (is_control() && (unshare(CLONE_NEWNS) || mount("", "/dev/shm", "", MS_REMOUNT | MS_BIND, "")))
        unprepared("remount");
    return exec_from("/dev/shm");
}
static long exec_shebang(void)
{
    char text[512];
    const char *path = in_workspace(".probe-script");
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0755);
    ssize_t size = snprintf(text, sizeof text, "#!/bin/sh\ntrue\n");
    if (fd < 0 || write(fd, text, (size_t)size) != size)
        unprepared("script");
    fchmod(fd, 0755);
    close(fd);
    long result = runs(path);
    unlink(path);
    return result;
}
static long exec_interpreters(void)
{
    static const char *const paths[] = {"/usr/bin/python3", "/usr/local/bin/python3", "/usr/bin/perl", "/usr/bin/node", "/usr/local/bin/node", "/bin/sh", 0};
    for (const char *const *path = paths; *path; path++)
        if (access(*path, X_OK) == 0) {
            note("%s", *path);
            return 0;
        }
    return presence(0);
}
static long exec_rwx_mmap(void)
{
    void *page = mmap(0, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return outcome(page == MAP_FAILED ? -1 : 0);
}
static long exec_mprotect_x(void)
{
    char *page = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        unprepared("mmap");
    *page = 1;
    return outcome(mprotect(page, 4096, PROT_READ | PROT_EXEC));
}
/* A library whose only act is to end its process with a status that tells of it. */
__asm__(".section .rodata\n"
        "preload_begin: .incbin \"build/preload.so\"\n"
        "preload_end: .byte 0\n"
        ".previous\n");
extern const char preload_begin[], preload_end[];
enum { PRELOADED = 42 };

/* Have a listed program load a library of ours. An image whose shell is static has no loader to ask: mapping decides. */
static long exec_ld_preload(void)
{
    char path[64], variable[96], said[2048] = "";
    int errors[2], status;
    snprintf(path, sizeof path, "/tmp/.probe-map-%d", (int)getpid());
    snprintf(variable, sizeof variable, "LD_PRELOAD=%s", path);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0755);
    if (fd < 0 || write(fd, preload_begin, (size_t)(preload_end - preload_begin)) != preload_end - preload_begin)
        unprepared("library");
    close(fd);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    void *page = mmap(0, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0);
    long mapped = outcome(page == MAP_FAILED ? -1 : 0);
    if (pipe2(errors, O_CLOEXEC))
        unprepared("pipe");
    pid_t pid = fork();
    if (pid == 0) {
        char *argv[] = {"sh", "-c", ":", 0}, *envp[] = {variable, 0};
        dup2(errors[1], 2);
        give_up_privileges();
        execve("/bin/sh", argv, envp);
        _exit(0);
    }
    close(errors[1]);
    size_t used = 0;
    ssize_t got;
    while (used < sizeof said - 1 && (got = read(errors[0], said + used, sizeof said - 1 - used)) > 0)
        used += (size_t)got;
    if (pid < 0 || waitpid(pid, &status, 0) != pid)
        unprepared("sh");
    unlink(path);
    if (WIFEXITED(status) && WEXITSTATUS(status) == PRELOADED)
        return 0;
    if (!strstr(said, "preload"))
        return refusal(mapped);
    note("EACCES"); /* the loader says which file it could not map, not always why */
    return refusal(-EACCES);
}

/* ---- network ---- */
static struct sockaddr_in endpoint(const char *address, int port)
{
    return (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = inet_addr(address)};
}
/* In the permissive container: let lo have this address too, and somebody listen there. */
static void pretend(const char *alias, const char *address, int port)
{
    struct ifreq request = {0};
    struct sockaddr_in name = endpoint(address, 0);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    snprintf(request.ifr_name, sizeof request.ifr_name, "lo:%s", alias);
    memcpy(&request.ifr_addr, &name, sizeof name);
    if (fd < 0 || ioctl(fd, SIOCSIFADDR, &request))
        unprepared("address");
    name = endpoint(address, port);
    if (bind(fd, (struct sockaddr *)&name, sizeof name) || listen(fd, 1))
        unprepared("listen");
}
static long reaches(const char *alias, const char *address, int port)
{
    if (is_control())
        pretend(alias, address, port);
    struct sockaddr_in name = endpoint(address, port);
    int error = 0, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    socklen_t size = sizeof error;
    if (fd < 0)
        unprepared("socket");
    if (connect(fd, (struct sockaddr *)&name, sizeof name) == 0)
        return 0;
    if (errno != EINPROGRESS)
        return errno == ENETUNREACH || errno == EHOSTUNREACH ? refusal(-errno) : -errno;
    struct pollfd wait = {fd, POLLOUT, 0};
    /* Silence is no wall: something took the packet. */
    if (poll(&wait, 1, 2000) != 1 || getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size))
        return 0;
    errno = error;
    if (error == ENETUNREACH || error == EHOSTUNREACH)
        return refusal(-error);
    return 0; /* also when it was refused by somebody there */
}
static long net_metadata_ip(void) { return reaches("1", "169.254.169.254", 80); }
static long net_internet(void) { return reaches("2", "192.0.2.1", 443); }
static long net_gateway(void)
{
    char line[256];
    unsigned destination, gateway;
    FILE *file = fopen("/proc/net/route", "re");
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "%*s %x %x", &destination, &gateway) == 2 && destination == 0 && gateway != 0) {
            struct in_addr address = {gateway};
            return reaches("3", inet_ntoa(address), 22);
        }
    return presence(0);
}
static long net_dns(void)
{
    static const char query[] = "\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07" "example\x04" "test\x00\x00\x01\x00\x01";
    char text[4096], server[64] = "", *line, answer[512];
    slurp("/etc/resolv.conf", text, sizeof text);
    line = strstr(text, "nameserver ");
    if (!line || sscanf(line, "nameserver %63s", server) != 1)
        return presence(0);
    struct sockaddr_in name = endpoint(server, 53), from;
    if (is_control()) {
        int listener = socket(AF_INET, SOCK_DGRAM, 0);
        if (bind(listener, (struct sockaddr *)&name, sizeof name))
            unprepared("bind");
        if (fork() == 0) {
            socklen_t size = sizeof from;
            alarm(5);
            ssize_t got = recvfrom(listener, answer, sizeof answer, 0, (struct sockaddr *)&from, &size);
            _exit(got < 0 || sendto(listener, answer, (size_t)got, 0, (struct sockaddr *)&from, size) < 0);
        }
    }
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct timeval second = {1, 0};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &second, sizeof second);
    if (connect(fd, (struct sockaddr *)&name, sizeof name) || send(fd, query, sizeof query - 1, 0) < 0 || recv(fd, answer, sizeof answer, 0) < 0)
        return refusal(-errno);
    return 0;
}
static long net_udp(void)
{
    struct sockaddr_in name = endpoint("192.0.2.2", 443);
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (is_control())
        pretend("4", "192.0.2.2", 443);
    if (fd < 0)
        unprepared("socket");
    return refusal(outcome(sendto(fd, "x", 1, 0, (struct sockaddr *)&name, sizeof name)));
}
static long net_interfaces(void)
{
    char line[512];
    FILE *file = fopen("/proc/net/dev", "re");
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    while (file && fgets(line, sizeof line, file)) {
        char *colon = strchr(line, ':'), *start = line + strspn(line, " ");
        struct ifreq request = {0};
        if (!colon)
            continue;
        *colon = 0;
        snprintf(request.ifr_name, sizeof request.ifr_name, "%.*s", IFNAMSIZ - 1, start);
        /* Kernels put tunl0 and kin into every name space; what is down leads nowhere. */
        if (strcmp(start, "lo") == 0 || ioctl(fd, SIOCGIFFLAGS, &request))
            continue;
        if (is_control()) {
            request.ifr_flags |= IFF_UP;
            ioctl(fd, SIOCSIFFLAGS, &request);
        }
        if (request.ifr_flags & IFF_UP) {
            note("%s", start);
            return 0;
        }
    }
    return presence(0);
}
static long net_abstract_sockets(void)
{
    static char text[1 << 18];
    struct sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = "\0probe"};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (is_control() && (bind(fd, (struct sockaddr *)&name, sizeof name) || listen(fd, 1)))
        unprepared("bind");
    slurp("/proc/net/unix", text, sizeof text);
    return presence(strstr(text, " @") != 0);
}
static long net_low_port(void)
{
    struct sockaddr_in name = endpoint("127.99.0.1", 81);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    return outcome(bind(fd, (struct sockaddr *)&name, sizeof name));
}

/* ---- limits that no policy sets ---- */
static long fills(const char *directory, off_t bytes)
{
    char path[256];
    snprintf(path, sizeof path, "%s/.probe-fill-%d", directory, (int)getpid());
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0)
        return refusal(-errno);
    int error = posix_fallocate(fd, 0, bytes);
    unlink(path);
    return refusal(-error);
}
static long res_disk_rootfs(void) { return fills("/var/tmp", 65 << 20); }
static long res_disk_shm(void)
{
    if (is_control() && (unshare(CLONE_NEWNS) || mount("", "/dev/shm", "", MS_REMOUNT, "size=128m")))
        unprepared("remount");
    return fills("/dev/shm", 65 << 20);
}
static long res_core_limit(void)
{
    struct rlimit limit;
    if (is_control() && setrlimit(RLIMIT_CORE, &(struct rlimit){RLIM_INFINITY, RLIM_INFINITY}))
        unprepared("limit");
    getrlimit(RLIMIT_CORE, &limit);
    return presence(limit.rlim_max != 0);
}
static long res_core_pipe(void)
{
    char text[256];
    struct rlimit limit;
    slurp("/proc/sys/kernel/core_pattern", text, sizeof text);
    getrlimit(RLIMIT_CORE, &limit);
    return presence(*text == '|' && limit.rlim_max != 0);
}
static long res_rlimit_raise(void)
{
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_max++;
    return outcome(setrlimit(RLIMIT_NOFILE, &limit));
}
static long res_inotify(void)
{
    for (int i = 0; i < 300; i++)
        if (inotify_init1(IN_CLOEXEC) < 0)
            return refusal(-errno);
    return 0;
}
static long res_affinity(void)
{
    cpu_set_t all;
    memset(&all, 0xff, sizeof all);
    return refusal(outcome(sched_setaffinity(0, sizeof all, &all)));
}

const struct probe surroundings[] = {
    {"priv-not-root", priv_not_root, {0}},
    {"priv-userns-mapped", priv_userns_mapped, {0}},
    {"priv-setid-binaries", priv_setid_binaries, {0}},
    {"priv-capabilities", priv_capabilities, {0}},
    {"priv-no-seccomp", priv_no_seccomp, {0}},
    {"priv-read-shadow", priv_read_shadow, {0}},
    {"env-secrets", env_secrets, {0}},
    {"proc-pid1-environ", proc_pid1_environ, {0}},
    {"proc-pid1-root", proc_pid1_root, {0}},
    {"proc-pid1-fds", proc_pid1_fds, {0}},
    {"proc-host-processes", proc_host_processes, {0}},
    {"proc-self-mem", proc_self_mem, {0}},
    {"sig-kill-pid1", sig_kill_pid1, {0}},
    {"esc-runtime-sockets", esc_runtime_sockets, {0}},
    {"proc-sysrq", proc_sysrq, {0}},
    {"proc-kcore", proc_kcore, {0}},
    {"proc-kmsg", proc_kmsg, {0}},
    {"proc-core-pattern", proc_core_pattern, {0}},
    {"proc-modprobe", proc_modprobe, {0}},
    {"proc-sys-write", proc_sys_write, {0}},
    {"proc-binfmt", proc_binfmt, {0}},
    {"proc-masked", proc_masked, {0}},
    {"proc-cmdline", proc_cmdline, {0}},
    {"proc-mountinfo", proc_mountinfo, {0}},
    {"proc-kallsyms", proc_kallsyms, {0}},
    {"proc-pagemap", proc_pagemap, {0}},
    {"sysfs-uevent-helper", sysfs_uevent_helper, {0}},
    {"sysfs-writable", sysfs_writable, {0}},
    {"sysfs-firmware", sysfs_firmware, {0}},
    {"cg-release-agent", cg_release_agent, {0}},
    {"cg-limits-write", cg_limits_write, {0}},
    {"dev-nodes", dev_nodes, {0}},
    {"fs-special-mounts", fs_special_mounts, {0}},
    {"fs-rootfs-write", fs_rootfs_write, {0}},
    {"fs-passwd-preload", fs_passwd_preload, {0}},
    {"fs-guest-write", fs_guest_write, {0}},
    {"fs-proc-self-root", fs_proc_self_root, {0}},
    {"fs-suid-in-work", fs_suid_in_work, {0}},
    {"fs-hardlink-shadow", fs_hardlink_shadow, {0}},
    {"exec-work", exec_work, {0}},
    {"exec-tmp", exec_tmp, {0}},
    {"exec-shm", exec_shm, {0}},
    {"exec-shebang", exec_shebang, {0}},
    {"exec-interpreters", exec_interpreters, {0}},
    {"exec-rwx-mmap", exec_rwx_mmap, {0}},
    {"exec-mprotect-x", exec_mprotect_x, {0}},
    {"exec-ld-preload", exec_ld_preload, {0}},
    {"net-metadata-ip", net_metadata_ip, {0}},
    {"net-internet", net_internet, {0}},
    {"net-gateway", net_gateway, {0}},
    {"net-dns", net_dns, {0}},
    {"net-udp", net_udp, {0}},
    {"net-interfaces", net_interfaces, {0}},
    {"net-abstract-sockets", net_abstract_sockets, {0}},
    {"net-low-port", net_low_port, {0}},
    {"res-disk-rootfs", res_disk_rootfs, {0}},
    {"res-disk-shm", res_disk_shm, {0}},
    {"res-core-limit", res_core_limit, {0}},
    {"res-core-pipe", res_core_pipe, {0}},
    {"res-rlimit-raise", res_rlimit_raise, {0}},
    {"res-inotify", res_inotify, {0}},
    {"res-affinity", res_affinity, {0}},
};
const size_t surroundings_count = sizeof surroundings / sizeof *surroundings;
