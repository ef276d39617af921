/*
 * Read and write one file of the workspace, each in a short-lived worker that PID 1 kills when it takes too long.
 *
 * Nothing here is a boundary against the processes of the container, which can do all this themselves. It keeps the
 * host from being shown, or from changing, anything but the workspace: paths are resolved beneath it by the kernel.
 */
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef RENAME_NOREPLACE
#define RENAME_NOREPLACE 1u
#endif

static uint8_t chunk[DATA_MAX];

void read_file(const struct read_request *request)
{
    struct stat facts;
    /* Look before opening: opening a FIFO or a device has effects, and may wait. Look again after: it may have been
     * exchanged, for which O_NONBLOCK is there (it also refuses to wait for the holder of a lease). */
    int fd = open_beneath(request->path, O_PATH);
    if (fd < 0)
        worker_failed(FAILED, errno, "open");
    for (int look = 0; look < 2; look++) {
        if (fstat(fd, &facts) < 0)
            worker_failed(FAILED, errno, "stat");
        if (S_ISDIR(facts.st_mode))
            worker_failed(FAILED, EISDIR, "open");
        if (!S_ISREG(facts.st_mode))
            worker_failed(FAILED, EINVAL, "not a regular file");
        if (look == 1)
            break;
        close(fd);
        fd = open_beneath(request->path, O_RDONLY | O_NONBLOCK | O_NOCTTY);
        if (fd < 0)
            worker_failed(FAILED, errno, "open");
    }
    uint64_t left = request->max_bytes;
    uint64_t size = (uint64_t)facts.st_size;
    if (request->offset > INT64_MAX || lseek(fd, (off_t)request->offset, SEEK_SET) < 0)
        worker_failed(FAILED, EINVAL, "seek");
    while (left > 0) {
        ssize_t got = read(fd, chunk, left < CHUNK_MAX ? (size_t)left : CHUNK_MAX);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            worker_failed(FAILED, errno, "read");
        if (got == 0)
            break;
        packet_send(CONTENT, chunk, (size_t)got);
        left -= (uint64_t)got;
    }
    uint8_t room[8];
    struct writer body = {room, sizeof room, 0, false};
    put_number(&body, size, 8);
    worker_done(READ_DONE, &body);
}

struct draft {
    int directory, fd;
    char name[48];
};

static _Noreturn void discard(const struct draft *draft, int error, const char *what)
{
    unlinkat(draft->directory, draft->name, 0);
    worker_failed(FAILED, error, what);
}

static void write_whole(const struct draft *draft, const uint8_t *at, size_t size)
{
    while (size > 0) {
        ssize_t put = write(draft->fd, at, size);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            discard(draft, put < 0 ? errno : EIO, "write");
        at += put;
        size -= (size_t)put;
    }
}

/* The rest of the content, asked for part by part: PID 1 never has to hold what a slow disk has not taken yet. */
static void receive_rest(const struct draft *draft, uint64_t left)
{
    while (left > 0) {
        uint8_t type;
        packet_send(WANT, NULL, 0);
        size_t size = packet_receive(&type, chunk, sizeof chunk, true);
        if (type == KILL)
            discard(draft, ECANCELED, "write");
        if (type != DATA || size == 0 || size > left)
            discard(draft, EPROTO, "more content than announced");
        write_whole(draft, chunk, size);
        left -= size;
    }
}

static int rename_new(const struct draft *draft, const char *name)
{
    if (syscall(SYS_renameat2, draft->directory, draft->name, draft->directory, name, RENAME_NOREPLACE) == 0)
        return 0;
    if (errno != ENOSYS && errno != EINVAL)
        return -1;
    /* A filesystem without RENAME_NOREPLACE: a hard link does not replace either. */
    if (linkat(draft->directory, draft->name, draft->directory, name, 0) < 0)
        return -1;
    return unlinkat(draft->directory, draft->name, 0);
}

/* Write to a draft beside the file, then rename: whoever looks sees the old content or the new, never a part. */
void write_file(const struct write_request *request)
{
    const char *name;
    struct stat old;
    struct draft draft;
    uint64_t nonce;
    draft.directory = open_parent(request->path, true, &name);
    if (draft.directory < 0)
        worker_failed(FAILED, errno, "open directory");
    mode_t mode = 0644;
    if (fstatat(draft.directory, name, &old, AT_SYMLINK_NOFOLLOW) == 0) {
        if (request->must_create)
            worker_failed(FAILED, EEXIST, "create");
        /* Renaming would replace the link, not what it leads to: not what anybody means by writing to it. */
        if (S_ISLNK(old.st_mode))
            worker_failed(FAILED, ELOOP, "a symbolic link");
        if (!S_ISREG(old.st_mode))
            worker_failed(FAILED, S_ISDIR(old.st_mode) ? EISDIR : EINVAL, "not a regular file");
        mode = old.st_mode & 0777;
    } else if (errno != ENOENT) {
        worker_failed(FAILED, errno, "stat");
    }
    if (getrandom(&nonce, sizeof nonce, 0) != (ssize_t)sizeof nonce)
        worker_failed(FAILED, errno, "getrandom");
    snprintf(draft.name, sizeof draft.name, ".agent-runner-%016llx.tmp", (unsigned long long)nonce);
    draft.fd = openat(draft.directory, draft.name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (draft.fd < 0)
        worker_failed(FAILED, errno, "create");
    write_whole(&draft, request->first.at, request->first.size);
    receive_rest(&draft, request->size - request->first.size);
    if (fchmod(draft.fd, mode) < 0)
        discard(&draft, errno, "chmod");
    if (close(draft.fd) < 0)
        discard(&draft, errno, "close");
    if (request->must_create ? rename_new(&draft, name) < 0
                             : renameat(draft.directory, draft.name, draft.directory, name) < 0)
        discard(&draft, errno, request->must_create ? "create" : "rename");
    worker_done(WRITE_DONE, NULL);
}
