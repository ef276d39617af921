/*
 * Open paths beneath the workspace, whatever symlinks the processes of the container make meanwhile.
 *
 * The kernel resolves (openat2), so there is no gap between the check and the use. Where it cannot (gVisor), each
 * component is opened by itself and every symlink is refused: less works, nothing more is reachable.
 */
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int walk_beneath(const char *path, int flags)
{
    char name[256];
    int at = openat(FD_WORKSPACE, ".", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (at < 0)
        return -1;
    if (path[0] == '/') {
        close(at);
        errno = EXDEV;
        return -1;
    }
    for (;;) {
        path += strspn(path, "/");
        size_t size = strcspn(path, "/");
        const char *rest = path + size + strspn(path + size, "/");
        int error = 0, next = -1;
        if (size >= sizeof name)
            error = ENAMETOOLONG;
        else if (size == 2 && path[0] == '.' && path[1] == '.')
            error = EXDEV; /* Cannot be followed safely without openat2: the directory may have been moved. */
        if (error == 0) {
            memcpy(name, size ? path : ".", size ? size : 1);
            name[size ? size : 1] = 0;
            int how = *rest ? O_PATH | O_DIRECTORY | O_CLOEXEC : flags;
            next = openat(at, name, how | O_NOFOLLOW);
            error = next < 0 ? errno : 0;
            struct stat facts;
            /* With O_PATH the link itself was opened, which nobody here asks for. */
            if (next >= 0 && (fstat(next, &facts) < 0 || S_ISLNK(facts.st_mode))) {
                close(next);
                error = ELOOP;
            }
        }
        close(at);
        if (error) {
            errno = error;
            return -1;
        }
        if (*rest == 0)
            return next;
        at = next;
        path = rest;
    }
}

static int open_resolving(const char *path, int flags, uint64_t resolve)
{
    if (path[0] == 0) {
        errno = ENOENT;
        return -1;
    }
    struct open_how how = {.flags = (uint64_t)(unsigned)(flags | O_CLOEXEC), .resolve = resolve};
    int fd, tries = 0;
    do /* EAGAIN: something was renamed while a ".." was resolved. Bounded: somebody may rename for ever. */
        fd = (int)syscall(SYS_openat2, FD_WORKSPACE, path, &how, sizeof how);
    while (fd < 0 && errno == EAGAIN && ++tries < 32);
    if (fd < 0 && errno == ENOSYS)
        return walk_beneath(path, flags | O_CLOEXEC);
    return fd;
}

int open_beneath(const char *path, int flags)
{
    return open_resolving(path, flags, RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS);
}

/* As open_beneath, and through no symlink at all: for walking a tree. */
int open_beneath_strict(const char *path, int flags)
{
    return open_resolving(path, flags, RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS);
}

/* Open the directory that holds the last component of path, making directories that are missing when asked to. */
int open_parent(const char *path, bool must_make, const char **name)
{
    char prefix[PATH_LIMIT];
    size_t size = strlen(path);
    const char *slash = strrchr(path, '/');
    *name = slash ? slash + 1 : path;
    if (size == 0 || size >= sizeof prefix || path[0] == '/') {
        errno = path[0] == '/' ? EXDEV : size == 0 ? ENOENT : ENAMETOOLONG;
        return -1;
    }
    if (**name == 0 || strcmp(*name, ".") == 0 || strcmp(*name, "..") == 0) {
        errno = EISDIR;
        return -1;
    }
    size = slash ? (size_t)(slash - path) : 0;
    memcpy(prefix, path, size);
    prefix[size] = 0;
    int fd = open_beneath(size ? prefix : ".", O_PATH | O_DIRECTORY);
    if (fd >= 0 || errno != ENOENT || !must_make)
        return fd;

    int at = open_beneath(".", O_PATH | O_DIRECTORY);
    for (size_t start = 0; at >= 0 && start < size;) {
        size_t end = start + strcspn(path + start, "/");
        prefix[end] = 0;
        /* Made in a directory that was itself resolved beneath; EEXIST is fine, and what it is shows at once. */
        if (end > start && mkdirat(at, prefix + start, 0777) < 0 && errno != EEXIST) {
            int error = errno;
            close(at);
            errno = error;
            return -1;
        }
        close(at);
        at = open_beneath(prefix, O_PATH | O_DIRECTORY);
        prefix[end] = '/';
        start = end + 1;
    }
    return at;
}
