/* System calls that a hostile job would try, and some that an honest one needs. See probe.h for what counts as what.
 *
 * Probes change nothing outside the container and never connect to anything but loopback.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/bpf.h>
#include <linux/filter.h>
#include <linux/netlink.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <termios.h>
#include <unistd.h>

#include "probe.h"

/* Numbers that older headers lack; the same on every architecture since 4.19 or so. */
enum {
    NR_pidfd_send_signal = 424, NR_io_uring_setup = 425, NR_open_tree = 428, NR_move_mount = 429,
    NR_fsopen = 430, NR_fspick = 433, NR_pidfd_open = 434, NR_clone3 = 435, NR_close_range = 436,
    NR_openat2 = 437, NR_pidfd_getfd = 438, NR_faccessat2 = 439, NR_mount_setattr = 442,
    NR_landlock_create_ruleset = 444, NR_memfd_secret = 447, NR_futex_waitv = 449, NR_cachestat = 451,
    NR_statmount = 457, NR_lsm_list_modules = 461,
};

#define HIGH (1UL << 32) /* a filter sees it, an int argument does not */
static pid_t victim(void)
{
    pid_t pid = fork();
    if (pid < 0)
        unprepared("fork");
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pause();
        _exit(0);
    }
    return pid;
}

static int scratch_file(void)
{
    int fd = open("f", O_RDWR | O_CREAT, 0600);
    if (fd < 0)
        unprepared("file");
    return fd;
}

/* An own pseudo-terminal as controlling terminal: the input that is injected stays ours. */
static int own_terminal(void)
{
    int leader = posix_openpt(O_RDWR | O_NOCTTY);
    if (leader < 0 || grantpt(leader) || unlockpt(leader))
        unprepared("pty");
    int follower = open(ptsname(leader), O_RDWR | O_NOCTTY);
    if (follower < 0 || setsid() < 0 || ioctl(follower, TIOCSCTTY, 0) < 0)
        unprepared("tty");
    return follower;
}

static int inet_socket(int type)
{
    int fd = socket(AF_INET, type | SOCK_CLOEXEC, 0);
    if (fd < 0)
        unprepared("socket");
    return fd;
}

/* ---- namespaces ---- */
static long ns_unshare_user(void) { return CALL(SYS_unshare, CLONE_NEWUSER); }
static long ns_unshare_net(void) { return CALL(SYS_unshare, CLONE_NEWNET); }
static long ns_unshare_pid(void) { return CALL(SYS_unshare, CLONE_NEWPID); }
static long ns_unshare_cgroup(void) { return CALL(SYS_unshare, CLONE_NEWCGROUP); }
static long ns_unshare_mount(void) { return CALL(SYS_unshare, CLONE_NEWNS); }
static long ns_unshare_time(void) { return CALL(SYS_unshare, 0x80); }
static long clone_with(unsigned long flags)
{
    long pid = syscall(SYS_clone, flags | SIGCHLD, 0, 0, 0, 0);
    if (pid == 0)
        _exit(0);
    return outcome(pid);
}
static long ns_clone_newuser(void) { return clone_with(CLONE_NEWUSER); }
static long ns_clone_newns(void) { return clone_with(CLONE_NEWNS); }
static long ns_clone_newcgroup(void) { return clone_with(CLONE_NEWCGROUP); }
static long ns_clone_newuts(void) { return clone_with(CLONE_NEWUTS); }
static long ns_clone_newipc(void) { return clone_with(CLONE_NEWIPC); }
static long ns_clone_newpid(void) { return clone_with(CLONE_NEWPID); }
static long ns_clone_newnet(void) { return clone_with(CLONE_NEWNET); }
static long hb_clone(void) { return clone_with(CLONE_NEWUSER | HIGH); }
static long ns_clone3_newuser(void)
{
    uint64_t args[8] = {CLONE_NEWUSER, 0, 0, 0, SIGCHLD, 0, 0, 0};
    long pid = syscall(NR_clone3, args, sizeof args);
    if (pid == 0)
        _exit(0);
    return outcome(pid);
}
static long ns_setns_self(void)
{
    int fd = open("/proc/self/ns/net", O_RDONLY);
    if (fd < 0)
        unprepared("ns");
    return CALL(SYS_setns, fd, 0);
}

/* ---- mounts ---- */
static long mnt_cgroup_v1(void) { return CALL(SYS_mount, "c", mounts, "cgroup", 0, "devices"); }
static long mnt_tmpfs(void) { return CALL(SYS_mount, "t", mounts, "tmpfs", 0, ""); }
static long mnt_overlay(void) { return CALL(SYS_mount, "o", mounts, "overlay", 0, "lowerdir=/proc:/sys"); }
static long mnt_umount_mask(void) { return CALL(SYS_umount2, "/proc/kcore", 2); }
static long mnt_umount_tmpfs(void) { return CALL(SYS_umount2, mounts, 2); }
static long mnt_remount_procsys(void) { return CALL(SYS_mount, "", "/proc/sys", "", 32 | 4096, ""); }
static long mnt_chroot(void) { return CALL(SYS_chroot, "/"); }
static long mnt_setattr(void)
{
    uint64_t attr[4] = {1, 0, 0, 0}; /* set read-only on the scratch mount */
    return CALL(NR_mount_setattr, AT_FDCWD, mounts, 0, attr, sizeof attr);
}
static long mnt_open_tree(void) { return CALL(NR_open_tree, AT_FDCWD, mounts, 1 | O_CLOEXEC); }
static long mnt_move_mount(void) { return CALL(NR_move_mount, -1, "", -1, "", 4); }
static long mnt_fsopen(void) { return CALL(NR_fsopen, "tmpfs", 0); }
static long mnt_fspick(void) { return CALL(NR_fspick, AT_FDCWD, mounts, 0); }
static long mnt_pivot_root(void) { return CALL(SYS_pivot_root, "/none", "/none"); }
static long mnt_statmount(void) { return CALL(NR_statmount, 0, 0, 0, 0); }
static long mknod_as(unsigned long mode, dev_t device)
{
    unlink("node");
    return CALL(SYS_mknodat, AT_FDCWD, "node", mode, device);
}
static long mnt_overlay_whiteout(void) { return mknod_as(S_IFCHR, 0); }
static long hb_mknod(void) { return mknod_as(S_IFCHR | 1UL << 16 | HIGH, 0); }
static long dev_mknod_char(void) { return mknod_as(S_IFCHR, makedev(1, 1)); }
static long dev_mknod_block(void) { return mknod_as(S_IFBLK, makedev(254, 0)); }
static long mknod_socket(void) { return mknod_as(S_IFSOCK, 0); }
#ifdef SYS_mknod
static long mknod_old_call(void) { unlink("node"); return CALL(SYS_mknod, "node", S_IFCHR, 0); }
#endif
static long mnt_trusted_xattr(void)
{
    scratch_file();
    return outcome(setxattr("f", "trusted.overlay.opaque", "y", 1, 0));
}
static long priv_file_caps(void)
{
    static const uint32_t caps[5] = {0x02000001, 1 << 21, 0, 0, 0};
    scratch_file();
    return outcome(setxattr("f", "security.capability", caps, sizeof caps, 0));
}

/* ---- identity ---- */
static long priv_setuid_0(void) { return CALL(SYS_setuid, 0); }
static long priv_setgroups(void) { gid_t none = 0; return CALL(SYS_setgroups, 1, &none); }
static long priv_chown(void) { scratch_file(); return outcome(chown("f", 4242, 4242)); }
static long priv_read_implies_exec(void) { return CALL(SYS_personality, READ_IMPLIES_EXEC); }
static long priv_aslr_off(void) { return CALL(SYS_personality, ADDR_NO_RANDOMIZE); }
static long hb_personality(void) { return CALL(SYS_personality, READ_IMPLIES_EXEC | HIGH); }

/* ---- kernel interfaces ---- */
static long sys_userfaultfd(void) { return CALL(SYS_userfaultfd, O_CLOEXEC | 1); }
static long sys_io_uring(void) { char params[256] = {0}; return CALL(NR_io_uring_setup, 1, params); }
static long sys_io_uring_enter(void) { return CALL(NR_io_uring_setup + 1, -1, 0, 0, 0, 0, 0); }
static long sys_io_uring_register(void) { return CALL(NR_io_uring_setup + 2, -1, 0, 0, 0); }
static long sys_bpf(void) { char attr[128] = {0}; return CALL(SYS_bpf, BPF_PROG_GET_NEXT_ID, attr, sizeof attr); }
static long sys_perf_event(void) { char attr[128] = {0}; return CALL(SYS_perf_event_open, attr, 0, -1, -1, 0); }
static long sys_keyctl(void) { return CALL(SYS_keyctl, 0, -3, 0); }
static long sys_add_key(void) { return CALL(SYS_add_key, "user", "probe", "x", 1, -2); }
static long sys_request_key(void) { return CALL(SYS_request_key, "user", "no-such-probe-key", 0, -2); }
static long sys_ptrace_me(void) { return CALL(SYS_ptrace, PTRACE_TRACEME, 0, 0, 0); }
static long sys_ptrace_seize(void) { return CALL(SYS_ptrace, PTRACE_SEIZE, victim(), 0, 0); }
static long vm_copy(long number)
{
    static char target, local;
    struct iovec here = {&local, 1}, there = {&target, 1};
    return CALL(number, victim(), &here, 1, &there, 1, 0);
}
static long sys_process_vm_readv(void) { return vm_copy(SYS_process_vm_readv); }
static long sys_process_vm_writev(void) { return vm_copy(SYS_process_vm_writev); }
static long sys_kcmp(void) { return CALL(SYS_kcmp, victim(), getpid(), 1, 0, 0); }
static long sys_pidfd_getfd(void)
{
    int pidfd = (int)syscall(NR_pidfd_open, victim(), 0);
    if (pidfd < 0)
        unprepared("pidfd");
    return CALL(NR_pidfd_getfd, pidfd, 1, 0);
}
struct handle { struct { unsigned bytes; int type; } head; unsigned char body[128]; };
static long sys_open_by_handle(void)
{
    struct handle root = {{8, 1}, {2}};
    int fd = open("/", O_RDONLY);
    return CALL(SYS_open_by_handle_at, fd, &root, O_RDONLY);
}
static long sys_name_to_handle(void)
{
    struct handle handle = {{sizeof handle.body, 0}, {0}};
    int mount_id;
    return CALL(SYS_name_to_handle_at, AT_FDCWD, ".", &handle, &mount_id, 0);
}
static long sys_init_module(void) { return CALL(SYS_init_module, 0, 0, ""); }
static long sys_finit_module(void) { return CALL(SYS_finit_module, -1, "", 0); }
static long sys_delete_module(void) { return CALL(SYS_delete_module, "no-such-module", O_NONBLOCK); }
static long sys_kexec(void) { return CALL(SYS_kexec_load, 0, 17, 0, 0); }
static long sys_kexec_file(void) { return CALL(SYS_kexec_file_load, -1, -1, 0, "", ~0UL); }
static long sys_reboot(void) { return CALL(SYS_reboot, 0, 0, 0, 0); }
static long sys_swapon(void) { return CALL(SYS_swapon, "/none", 0); }
static long sys_quotactl(void) { return CALL(SYS_quotactl, 0x800001 << 8, 0, 0, 0); }
static long sys_acct(void) { return CALL(SYS_acct, "/none"); }
static long sys_clock_settime(void) { return CALL(SYS_clock_settime, 0, 0); }
static long sys_adjtimex(void) { return CALL(SYS_adjtimex, 0); }
static long sys_sethostname(void)
{
    char name[65];
    if (gethostname(name, sizeof name))
        unprepared("hostname");
    return CALL(SYS_sethostname, name, strlen(name));
}
static long sys_syslog(void) { char text[64]; return CALL(SYS_syslog, 3, text, sizeof text); }
static long sys_fanotify_fid(void) { return CALL(SYS_fanotify_init, 0x200, O_RDONLY); }
static long sys_mempolicy(void) { int mode; return CALL(SYS_get_mempolicy, &mode, 0, 0, 0, 0); }
static long sys_mbind(void) { return CALL(SYS_mbind, 0, 0, 0, 0, 0, 0); }
static long sys_move_pages(void) { return CALL(SYS_move_pages, 0, 0, 0, 0, 0, 0); }
static long sys_vhangup(void) { setsid(); return CALL(SYS_vhangup); }
static long sys_memfd_secret(void) { return CALL(NR_memfd_secret, 0); }
static long sys_lsm_list(void) { return CALL(NR_lsm_list_modules, 0, 0, 0); }
static long sys_cachestat(void) { return CALL(NR_cachestat, -1, 0, 0, 0); }
static long sys_unknown(void) { return CALL(1000); }
static long sys_vmsplice(void)
{
    int ends[2];
    struct iovec piece = {"x", 1};
    if (pipe(ends))
        unprepared("pipe");
    return CALL(SYS_vmsplice, ends[1], &piece, 1, 0);
}
static long sys_aio(void) { unsigned long context = 0; return CALL(SYS_io_setup, 1, &context); }
static long sys_mq(void) { return CALL(SYS_mq_open, "probe", O_CREAT | O_RDWR, 0600, 0); }
static long sys_msgget(void) { return CALL(SYS_msgget, 0, 0600 | 01000); }
static long sys_semget(void) { return CALL(SYS_semget, 0, 1, 0600 | 01000); }
static long res_sysv_shm(void)
{
    long id = syscall(SYS_shmget, 0, 512UL << 20, 0600 | 01000);
    if (id >= 0)
        syscall(SYS_shmctl, id, 0, 0);
    return outcome(id);
}
static long sys_prlimit_other(void)
{
    struct rlimit limit = {0, 0};
    return CALL(SYS_prlimit64, victim(), RLIMIT_CORE, &limit, 0);
}
static long hb_prlimit(void)
{
    struct rlimit limit = {0, 0};
    return CALL(SYS_prlimit64, (unsigned long)victim() | HIGH, RLIMIT_CORE, &limit, 0);
}
static long new_listener(void)
{
    struct sock_filter allow[] = {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    struct sock_fprog program = {1, allow};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
}
static long sys_nested_listener(void)
{
    long result = outcome(new_listener());
    return result == -EBUSY ? refusal(result) : result; /* there is one above us already */
}
static long ioctl_notify_addfd(void)
{
    uint64_t nobody[3] = {~0ULL};
    return CALL(SYS_ioctl, new_listener(), 0x40182103, nobody);
}
static long need_exec_notification(void)
{
    uint64_t nobody = ~0ULL;
    return CALL(SYS_ioctl, new_listener(), 0x40082102, &nobody);
}
#ifdef __x86_64__
static long sys_iopl(void) { return CALL(SYS_iopl, 3); }
static long sys_ioperm(void) { return CALL(SYS_ioperm, 0x80, 1, 1); }
static long sys_modify_ldt(void) { char entry[8]; return CALL(SYS_modify_ldt, 0, entry, sizeof entry); }
static long sys_x32_abi(void) { return CALL(0x40000000 | SYS_getpid); }
static long sys_i386_abi(void)
{
    long result = 20; /* getpid there */
    __asm__ volatile("int $0x80" : "+a"(result) : : "memory", "r8", "r9", "r10", "r11");
    if (result < 0)
        errno = (int)-result;
    return outcome(result < 0 ? -1 : 0);
}
#endif

/* ---- running what no path rule sees ---- */
static long memfd_with(unsigned flags) { return CALL(SYS_memfd_create, "p", flags); }
static long exec_memfd(void) { return memfd_with(0); }
static long exec_memfd_mfdexec(void) { return memfd_with(0x10); }
static long exec_execveat(void)
{
    int fd = open("/proc/self/exe", O_PATH | O_CLOEXEC);
    char *argv[] = {"probe", "need-nothing", 0}, *envp[] = {0};
    if (fd < 0)
        unprepared("self");
    pid_t pid = fork();
    if (pid == 0) {
        int sink = open("/dev/null", O_WRONLY);
        dup2(sink, 1);
        syscall(SYS_execveat, fd, "", argv, envp, AT_EMPTY_PATH);
        _exit(errno);
    }
    int status;
    if (waitpid(pid, &status, 0) != pid || !WIFEXITED(status))
        unprepared("wait");
    errno = WEXITSTATUS(status);
    return outcome(errno ? -1 : 0);
}

/* ---- terminals and files ---- */
static long tty_tiocsti(void) { return CALL(SYS_ioctl, own_terminal(), TIOCSTI, "x"); }
static long hb_ioctl(void) { return CALL(SYS_ioctl, own_terminal(), TIOCSTI | HIGH, "x"); }
static long tty_tioclinux(void) { char sub = 6; return CALL(SYS_ioctl, own_terminal(), TIOCLINUX, &sub); }
static long tty_ldisc(void) { int hdlc = 13; return CALL(SYS_ioctl, own_terminal(), TIOCSETD, &hdlc); }
static long ioctl_nsfs(void)
{
    int fd = open("/proc/self/ns/pid", O_RDONLY);
    if (fd < 0)
        unprepared("ns");
    return CALL(SYS_ioctl, fd, 0xb703, 0);
}
static long ioctl_project_id(void) { return CALL(SYS_ioctl, scratch_file(), 0x401c5820, 0); }
static long ioctl_verity(void) { return CALL(SYS_ioctl, scratch_file(), 0x40806685, 0); }

/* ---- scheduling ---- */
static long set_policy(unsigned long policy)
{
    struct sched_param one = {.sched_priority = 1};
    return CALL(SYS_sched_setscheduler, 0, policy, &one);
}
static long res_sched_fifo(void) { return set_policy(SCHED_FIFO); }
static long res_sched_rr_reset(void) { return set_policy(SCHED_RR | SCHED_RESET_ON_FORK); }
static long hb_sched(void) { return set_policy(SCHED_FIFO | HIGH); }
static long res_nice(void) { return outcome(setpriority(PRIO_PROCESS, 0, -5)); }
static long res_ioprio_rt(void) { return CALL(SYS_ioprio_set, 1, 0, 1 << 13); }
static long res_mlock(void)
{
    size_t size = 64UL << 20;
    void *memory = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        unprepared("mmap");
    if (mlock(memory, size) == 0)
        return 0;
    return errno == ENOMEM ? -EPERM : -errno; /* ENOMEM is how this limit refuses */
}

/* ---- sockets ---- */
static long sock(unsigned long family, unsigned long type, unsigned long protocol)
{
    return CALL(SYS_socket, family, type, protocol);
}
static long net_af_packet(void) { return sock(AF_PACKET, SOCK_RAW, 0); }
static long net_raw_icmp(void) { return sock(AF_INET, SOCK_RAW, IPPROTO_ICMP); }
static long net_ping_icmp(void) { return sock(AF_INET, SOCK_DGRAM, IPPROTO_ICMP); }
static long net_af_alg(void) { return sock(AF_ALG, SOCK_SEQPACKET, 0); }
static long net_af_vsock(void) { return sock(AF_VSOCK, SOCK_STREAM, 0); }
static long net_af_key(void) { return sock(AF_KEY, SOCK_RAW, 2); }
static long net_af_xdp(void) { return sock(44, SOCK_RAW, 0); }
static long net_netlink_route(void) { return sock(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE); }
static long net_netlink_netfilter(void) { return sock(AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER); }
static long net_netlink_uevent(void) { return sock(AF_NETLINK, SOCK_RAW, NETLINK_KOBJECT_UEVENT); }
static long net_netlink_xfrm(void) { return sock(AF_NETLINK, SOCK_RAW, NETLINK_XFRM); }
static long net_netlink_generic(void) { return sock(AF_NETLINK, SOCK_RAW, NETLINK_GENERIC); }
static long net_netlink_audit(void) { return sock(AF_NETLINK, SOCK_RAW, NETLINK_AUDIT); }
static long net_sctp(void) { return sock(AF_INET, SOCK_STREAM, 132); }
static long net_mptcp(void) { return sock(AF_INET, SOCK_STREAM, 262); }
static long net_smc(void) { return sock(AF_INET, SOCK_STREAM, 256); }
static long net_udplite(void) { return sock(AF_INET, SOCK_DGRAM, 136); }
static long net_l2tp(void) { return sock(AF_INET, SOCK_DGRAM, 115); }
static long net_socketpair_tipc(void) { int pair[2]; return CALL(SYS_socketpair, 30, SOCK_STREAM, 0, pair); }
static long hb_socket(void) { return sock(AF_PACKET | HIGH, SOCK_RAW, 0); }
static long hb_socket_type(void) { return sock(AF_INET, SOCK_RAW | HIGH, IPPROTO_ICMP); }
static long hb_socket_protocol(void) { return sock(AF_INET, SOCK_STREAM, 262 | HIGH); }
/* Every family but the three that are allowed: none may reach the kernel, which would load a module for it. */
static long net_rare_families(void)
{
    static const int types[] = {SOCK_STREAM, SOCK_DGRAM, SOCK_RAW, SOCK_SEQPACKET};
    for (int family = 0; family < 64; family++) {
        if (family == AF_UNIX || family == AF_INET || family == AF_INET6)
            continue;
        for (unsigned i = 0; i < sizeof types / sizeof *types; i++) {
            errno = 0;
            if (syscall(SYS_socket, family, types[i], 0) >= 0 || (errno != EPERM && errno != ENOSYS))
                return 0;
        }
    }
    return -EPERM;
}
static long set_option(int type, unsigned long level, unsigned long name)
{
    int fd = inet_socket(type), value = 2;
    if (level == IPPROTO_TCP && name == 31)
        return CALL(SYS_setsockopt, fd, level, name, "tls", 4);
    return CALL(SYS_setsockopt, fd, level, name, &value, sizeof value);
}
static long net_tls_ulp(void) { return set_option(SOCK_STREAM, IPPROTO_TCP, 31); }
static long net_udp_encap(void) { return set_option(SOCK_DGRAM, IPPROTO_UDP, 100); }
static long net_option_level(void) { return set_option(SOCK_STREAM, 282, 1); }
static long hb_setsockopt(void) { return set_option(SOCK_DGRAM, IPPROTO_UDP | HIGH, 100 | HIGH); }
static long net_iptables(void)
{
    char info[84] = "filter";
    socklen_t size = sizeof info;
    int fd = (int)syscall(SYS_socket, AF_INET, SOCK_RAW, IPPROTO_RAW);
    return fd < 0 ? outcome(fd) : CALL(SYS_getsockopt, fd, 0, 64, info, &size);
}

/* ---- what honest work needs: must work in both containers ---- */
static long need_nothing(void) { return 0; }
static void *in_thread(void *argument) { return argument; }
static long need_thread(void)
{
    pthread_t thread;
    errno = pthread_create(&thread, 0, in_thread, 0);
    return outcome(errno ? -1 : pthread_join(thread, 0));
}
static long need_openat2(void)
{
    uint64_t how[3] = {O_RDONLY, 0, 8}; /* RESOLVE_BENEATH */
    int directory = open("/proc", O_PATH | O_DIRECTORY);
    return CALL(NR_openat2, directory, "self/status", how, sizeof how);
}
static long need_openat2_refuses(void)
{
    uint64_t how[3] = {O_RDONLY, 0, 8};
    int directory = open(".", O_PATH | O_DIRECTORY);
    long fd = syscall(NR_openat2, directory, "../proc", how, sizeof how);
    return fd < 0 && errno == EXDEV ? 0 : -EINVAL;
}
static long need_close_range(void) { return CALL(NR_close_range, 100, ~0U, 0); }
static long need_pidfd(void)
{
    pid_t pid = victim();
    int fd = (int)syscall(NR_pidfd_open, pid, 0);
    siginfo_t info;
    if (fd < 0 || syscall(NR_pidfd_send_signal, fd, SIGKILL, 0, 0))
        return -errno;
    return CALL(SYS_waitid, 3, fd, &info, WEXITED, 0); /* P_PIDFD */
}
static long need_landlock(void) { return CALL(NR_landlock_create_ruleset, 0, 0, 1); }
static long need_filter(void)
{
    struct sock_filter allow[] = {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    struct sock_fprog program = {1, allow};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    return CALL(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program);
}
static long need_prctl(void)
{
    return outcome(prctl(PR_SET_DUMPABLE, 0) | prctl(PR_SET_PDEATHSIG, SIGKILL) | prctl(PR_SET_CHILD_SUBREAPER, 1));
}
static long need_events(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    struct epoll_event event = {.events = EPOLLIN};
    struct pollfd none = {-1, 0, 0};
    struct timespec now = {0, 0};
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, signalfd(-1, &set, SFD_CLOEXEC), &event) ||
        epoll_ctl(epoll, EPOLL_CTL_ADD, eventfd(0, 0), &event) ||
        epoll_ctl(epoll, EPOLL_CTL_ADD, timerfd_create(CLOCK_MONOTONIC, 0), &event) ||
        epoll_ctl(epoll, EPOLL_CTL_ADD, inotify_init1(0), &event))
        return -errno;
    return outcome(ppoll(&none, 1, &now, &set));
}
static long need_limits(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit))
        return -errno;
    return outcome(setrlimit(RLIMIT_NOFILE, &limit));
}
static long need_unix_socket(void)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = "s"};
    int pair[2], fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    unlink(name.sun_path);
    if (fd < 0 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
        return -errno;
    return outcome(bind(fd, (struct sockaddr *)&name, sizeof name) | listen(fd, 1));
}
static long need_high_bits_are_harmless(void) { return sock(AF_UNIX | HIGH, SOCK_STREAM | HIGH, 0); }
static long loopback(int family, int type)
{
    struct sockaddr_in6 name = {.sin6_family = (sa_family_t)family}; /* any address, any port: fits both families */
    struct timeval second = {1, 0};
    int one = 1, fd = socket(family, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) ||
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &second, sizeof second))
        return -errno;
    if (type == SOCK_STREAM && (setsockopt(fd, IPPROTO_TCP, 1, &one, sizeof one) ||
                                setsockopt(fd, IPPROTO_TCP, 18, &one, sizeof one)))
        return -errno;
    return outcome(bind(fd, (struct sockaddr *)&name, sizeof name));
}
static long need_tcp(void) { return loopback(AF_INET, SOCK_STREAM); }
static long need_udp(void) { return loopback(AF_INET, SOCK_DGRAM); }
static long need_tcp6(void) { return sock(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, IPPROTO_TCP); }
static long need_fifo(void) { unlink("p"); return outcome(mkfifo("p", 0600)); }
static long need_terminal(void)
{
    struct winsize size = {24, 80, 0, 0};
    struct termios modes;
    int fd = own_terminal();
    return outcome(tcgetattr(fd, &modes) | tcsetattr(fd, TCSANOW, &modes) | ioctl(fd, TIOCSWINSZ, &size) |
                   tcsetpgrp(fd, getpgrp()));
}
static long need_ioctl(void)
{
    int ends[2], on = 1, waiting;
    if (pipe(ends))
        return -errno;
    return outcome(ioctl(ends[0], FIONBIO, &on) | ioctl(ends[0], FIOCLEX) | ioctl(ends[0], FIONREAD, &waiting));
}
static long need_jit(void)
{
    void *page = mmap(0, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return outcome(page == MAP_FAILED ? -1 : mprotect(page, 4096, PROT_READ | PROT_EXEC));
}
static long need_membarrier(void) { return CALL(SYS_membarrier, 0, 0, 0); }
static long need_personality_query(void) { return CALL(SYS_personality, 0xffffffffUL); }
static long need_batch(void)
{
    struct sched_param none = {0};
    return CALL(SYS_sched_setscheduler, 0, SCHED_BATCH, &none);
}
static long need_xattr(void) { scratch_file(); return outcome(setxattr("f", "user.a", "b", 1, 0)); }
static long need_copy(void)
{
    int from = scratch_file(), to = open("g", O_WRONLY | O_CREAT, 0600);
    if (write(from, "x", 1) != 1)
        return -errno;
    loff_t start = 0;
    return CALL(SYS_copy_file_range, from, &start, to, 0, 1, 0);
}

const struct probe system_calls[] = {
    {"ns-unshare-user", ns_unshare_user, {0}},
    {"ns-unshare-net", ns_unshare_net, {0}},
    {"ns-unshare-pid", ns_unshare_pid, {0}},
    {"ns-unshare-cgroup", ns_unshare_cgroup, {0}},
    {"ns-unshare-mount", ns_unshare_mount, {0}},
    {"ns-unshare-time", ns_unshare_time, {0}},
    {"ns-clone-newuser", ns_clone_newuser, {0}},
    {"ns-clone-newns", ns_clone_newns, {0}},
    {"ns-clone-newcgroup", ns_clone_newcgroup, {0}},
    {"ns-clone-newuts", ns_clone_newuts, {0}},
    {"ns-clone-newipc", ns_clone_newipc, {0}},
    {"ns-clone-newpid", ns_clone_newpid, {0}},
    {"ns-clone-newnet", ns_clone_newnet, {0}},
    {"hb-clone-high-bits", hb_clone, {0}},
    {"ns-clone3-newuser", ns_clone3_newuser, {0}},
    {"ns-setns-self", ns_setns_self, {0}},
    {"mnt-cgroup-v1", mnt_cgroup_v1, {EBUSY}},
    {"mnt-tmpfs", mnt_tmpfs, {0}},
    {"mnt-overlay", mnt_overlay, {EINVAL}},
    {"mnt-umount-mask", mnt_umount_mask, {EINVAL}},
    {"mnt-umount-tmpfs", mnt_umount_tmpfs, {0}},
    {"mnt-remount-procsys", mnt_remount_procsys, {EINVAL}},
    {"mnt-chroot", mnt_chroot, {0}},
    {"mnt-setattr", mnt_setattr, {0}},
    {"mnt-open-tree", mnt_open_tree, {0}},
    {"mnt-move-mount", mnt_move_mount, {EBADF, EINVAL, ENOENT}},
    {"mnt-fsopen", mnt_fsopen, {0}},
    {"mnt-fspick", mnt_fspick, {0}},
    {"mnt-pivot-root", mnt_pivot_root, {ENOENT}},
    {"mnt-statmount", mnt_statmount, {EFAULT, EINVAL}},
    {"mnt-overlay-whiteout", mnt_overlay_whiteout, {0}},
    {"hb-mknod-high-bits", hb_mknod, {0}},
    {"dev-mknod-char", dev_mknod_char, {0}},
    {"dev-mknod-block", dev_mknod_block, {0}},
    {"dev-mknod-socket", mknod_socket, {0}},
#ifdef SYS_mknod
    {"dev-mknod-old-call", mknod_old_call, {0}},
#endif
    {"mnt-trusted-xattr", mnt_trusted_xattr, {0}},
    {"priv-file-caps", priv_file_caps, {0}},
    {"priv-setuid-0", priv_setuid_0, {0}},
    {"priv-setgroups", priv_setgroups, {0}},
    {"priv-chown", priv_chown, {0}},
    {"priv-read-implies-exec", priv_read_implies_exec, {0}},
    {"priv-aslr-off", priv_aslr_off, {0}},
    {"hb-personality-high-bits", hb_personality, {0}},
    {"sys-userfaultfd", sys_userfaultfd, {0}},
    {"sys-io-uring", sys_io_uring, {0}},
    {"sys-io-uring-enter", sys_io_uring_enter, {EBADF}},
    {"sys-io-uring-register", sys_io_uring_register, {EBADF, EINVAL}},
    {"sys-bpf", sys_bpf, {ENOENT}},
    {"sys-perf-event", sys_perf_event, {ENOENT, EINVAL, EOPNOTSUPP}},
    {"sys-keyctl", sys_keyctl, {ENOKEY}},
    {"sys-add-key", sys_add_key, {0}},
    {"sys-request-key", sys_request_key, {ENOKEY, ENOENT}},
    {"sys-ptrace-me", sys_ptrace_me, {0}},
    {"sys-ptrace-seize", sys_ptrace_seize, {0}},
    {"sys-process-vm-readv", sys_process_vm_readv, {0}},
    {"sys-process-vm-writev", sys_process_vm_writev, {0}},
    {"sys-kcmp", sys_kcmp, {0}},
    {"sys-pidfd-getfd", sys_pidfd_getfd, {0}},
    {"sys-open-by-handle", sys_open_by_handle, {ESTALE, EOPNOTSUPP, EINVAL}},
    {"sys-name-to-handle", sys_name_to_handle, {EOPNOTSUPP, EOVERFLOW}},
    {"sys-init-module", sys_init_module, {EFAULT, ENOEXEC, EINVAL}},
    {"sys-finit-module", sys_finit_module, {EBADF}},
    {"sys-delete-module", sys_delete_module, {ENOENT}},
    {"sys-kexec", sys_kexec, {EINVAL}},
    {"sys-kexec-file", sys_kexec_file, {EINVAL}},
    {"sys-reboot", sys_reboot, {EINVAL}},
    {"sys-swapon", sys_swapon, {ENOENT}},
    {"sys-quotactl", sys_quotactl, {ESRCH, EINVAL, ENODEV, ENOENT}},
    {"sys-acct", sys_acct, {ENOENT}},
    {"sys-clock-settime", sys_clock_settime, {EFAULT}},
    {"sys-adjtimex", sys_adjtimex, {EFAULT}},
    {"sys-sethostname", sys_sethostname, {0}},
    {"sys-syslog", sys_syslog, {0}},
    {"sys-fanotify-fid", sys_fanotify_fid, {0}},
    {"sys-mempolicy", sys_mempolicy, {0}},
    {"sys-mbind", sys_mbind, {EINVAL}},
    {"sys-move-pages", sys_move_pages, {0}},
    {"sys-vhangup", sys_vhangup, {0}},
    {"sys-memfd-secret", sys_memfd_secret, {0}},
    {"sys-lsm-list", sys_lsm_list, {EFAULT, EINVAL}},
    {"sys-cachestat", sys_cachestat, {EBADF}},
    {"sys-unknown-enosys", sys_unknown, {0}},
    {"sys-vmsplice", sys_vmsplice, {0}},
    {"sys-aio", sys_aio, {0}},
    {"sys-mq", sys_mq, {0}},
    {"sys-msgget", sys_msgget, {0}},
    {"sys-semget", sys_semget, {0}},
    {"res-sysv-shm", res_sysv_shm, {0}},
    {"sys-prlimit-other", sys_prlimit_other, {0}},
    {"hb-prlimit-high-bits", hb_prlimit, {0}},
    {"sys-nested-listener", sys_nested_listener, {0}},
#ifdef __x86_64__
    {"sys-iopl", sys_iopl, {0}},
    {"sys-ioperm", sys_ioperm, {0}},
    {"sys-modify-ldt", sys_modify_ldt, {0}},
    {"sys-x32-abi", sys_x32_abi, {0}},
    {"sys-i386-abi", sys_i386_abi, {0}},
#endif
    {"exec-memfd", exec_memfd, {0}},
    {"exec-memfd-mfdexec", exec_memfd_mfdexec, {0}},
    {"exec-execveat", exec_execveat, {0}},
    {"tty-tiocsti", tty_tiocsti, {0}},
    {"hb-ioctl-high-bits", hb_ioctl, {0}},
    {"tty-tioclinux", tty_tioclinux, {ENOTTY, EINVAL}},
    {"tty-ldisc", tty_ldisc, {EINVAL}},
    {"ioctl-nsfs", ioctl_nsfs, {0}},
    {"ioctl-project-id", ioctl_project_id, {EFAULT, ENOTTY, EOPNOTSUPP}},
    {"ioctl-notify-addfd", ioctl_notify_addfd, {ENOENT}},
    {"ioctl-verity", ioctl_verity, {EFAULT, ENOTTY, EOPNOTSUPP}},
    {"res-sched-fifo", res_sched_fifo, {0}},
    {"res-sched-rr-reset", res_sched_rr_reset, {0}},
    {"hb-sched-high-bits", hb_sched, {0}},
    {"res-nice", res_nice, {0}},
    {"res-ioprio-rt", res_ioprio_rt, {0}},
    {"res-mlock", res_mlock, {0}},
    {"net-af-packet", net_af_packet, {0}},
    {"net-raw-icmp", net_raw_icmp, {0}},
    {"net-ping-icmp", net_ping_icmp, {0}},
    {"net-af-alg", net_af_alg, {EAFNOSUPPORT}},
    {"net-af-vsock", net_af_vsock, {EAFNOSUPPORT}},
    {"net-af-key", net_af_key, {EAFNOSUPPORT}},
    {"net-af-xdp", net_af_xdp, {EAFNOSUPPORT}},
    {"net-netlink-route", net_netlink_route, {0}},
    {"net-netlink-netfilter", net_netlink_netfilter, {EPROTONOSUPPORT}},
    {"net-netlink-uevent", net_netlink_uevent, {0}},
    {"net-netlink-xfrm", net_netlink_xfrm, {EPROTONOSUPPORT}},
    {"net-netlink-generic", net_netlink_generic, {0}},
    {"net-netlink-audit", net_netlink_audit, {EPROTONOSUPPORT}},
    {"net-rare-families", net_rare_families, {0}},
    {"net-sctp", net_sctp, {EPROTONOSUPPORT, ESOCKTNOSUPPORT}},
    {"net-mptcp", net_mptcp, {EPROTONOSUPPORT}},
    {"net-smc", net_smc, {EPROTONOSUPPORT, ESOCKTNOSUPPORT}},
    {"net-udplite", net_udplite, {EPROTONOSUPPORT}},
    {"net-l2tp", net_l2tp, {EPROTONOSUPPORT, ESOCKTNOSUPPORT}},
    {"net-socketpair-tipc", net_socketpair_tipc, {EAFNOSUPPORT, EOPNOTSUPP}},
    {"hb-socket-high-bits", hb_socket, {0}},
    {"hb-socket-type-high-bits", hb_socket_type, {EINVAL}},
    {"hb-socket-protocol-high-bits", hb_socket_protocol, {EPROTONOSUPPORT}},
    {"net-tls-ulp", net_tls_ulp, {ENOENT, ENOTCONN}},
    {"net-udp-encap", net_udp_encap, {ENOPROTOOPT}},
    {"hb-setsockopt-high-bits", hb_setsockopt, {ENOPROTOOPT}},
    {"net-option-level", net_option_level, {ENOPROTOOPT}},
    {"net-iptables", net_iptables, {ENOENT, ENOPROTOOPT}},

    {"need-nothing", need_nothing, {0}},
    {"need-thread", need_thread, {0}},
    {"need-openat2", need_openat2, {0}},
    {"need-exec-notification", need_exec_notification, {ENOENT}},
    {"need-openat2-beneath", need_openat2_refuses, {0}},
    {"need-close-range", need_close_range, {0}},
    {"need-pidfd", need_pidfd, {0}},
    {"need-landlock", need_landlock, {0}},
    {"need-filter", need_filter, {0}},
    {"need-prctl", need_prctl, {0}},
    {"need-events", need_events, {0}},
    {"need-limits", need_limits, {0}},
    {"need-unix-socket", need_unix_socket, {0}},
    {"need-high-bits-are-harmless", need_high_bits_are_harmless, {0}},
    {"need-tcp", need_tcp, {0}},
    {"need-udp", need_udp, {0}},
    {"need-tcp6", need_tcp6, {EAFNOSUPPORT}},
    {"need-fifo", need_fifo, {0}},
    {"need-terminal", need_terminal, {0}},
    {"need-ioctl", need_ioctl, {0}},
    {"need-jit", need_jit, {0}},
    {"need-membarrier", need_membarrier, {0}},
    {"need-personality-query", need_personality_query, {0}},
    {"need-batch", need_batch, {0}},
    {"need-xattr", need_xattr, {EOPNOTSUPP}},
    {"need-copy", need_copy, {0}},
};

const size_t system_calls_count = sizeof system_calls / sizeof *system_calls;
