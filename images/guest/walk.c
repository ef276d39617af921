/*
 * List and search the workspace, each in a worker of its own: a regular expression or a hostile tree can hold up
 * nothing but this process, which PID 1 kills when it takes too long.
 *
 * Directories are opened anew by their whole path, through no symlink: one descriptor whatever the depth, and a
 * directory that is exchanged for a link meanwhile is skipped. Names are visited in byte order of their paths, so
 * that what a bound cuts off does not depend on the filesystem.
 */
#include "guest.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <regex.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define ARENA_BYTES (32u * 1024 * 1024) /* names of the directories from the root to the current one */
#define BUFFER_BYTES (1024u * 1024)     /* a longer line is searched in pieces */
#define BINARY_BYTES 8192u              /* a NUL in these makes a file binary, as in git */

struct __attribute__((packed)) name {
    uint8_t kind;
    uint64_t size;
    char text[]; /* a directory's ends in '/', so that comparing names is comparing paths */
};

struct walk {
    bool is_recursive, skip_git;
    uint32_t room; /* entries or matches that may still be sent */
    bool is_cut;
    void (*visit)(struct walk *walk, const char *path, uint8_t kind, uint64_t size);
    regex_t pattern;
    struct writer reply;
    uint8_t reply_type;
};

static uint8_t arena[ARENA_BYTES];
static size_t arena_used;
static uint8_t reply_bytes[CHUNK_MAX];
static char buffer[BUFFER_BYTES];
static char path[PATH_LIMIT];

static void send_reply(struct walk *walk)
{
    if (walk->reply.used > 0)
        packet_send(walk->reply_type, walk->reply.at, walk->reply.used);
    walk->reply.used = 0;
}

/* Make sure that the next item fits; a path and a line are far smaller than a packet. */
static bool take_item(struct walk *walk)
{
    if (walk->room == 0) {
        walk->is_cut = true;
        return false;
    }
    walk->room--;
    if (walk->reply.size - walk->reply.used < PATH_LIMIT + LINE_MAX_KEPT + 32)
        send_reply(walk);
    return true;
}

static uint8_t kind_of(mode_t mode)
{
    return S_ISREG(mode) ? KIND_FILE : S_ISDIR(mode) ? KIND_DIRECTORY : S_ISLNK(mode) ? KIND_SYMLINK : KIND_OTHER;
}

static int by_text(const void *left, const void *right)
{
    const struct name *const *a = left, *const *b = right;
    return strcmp((*a)->text, (*b)->text);
}

/* Put the names of a directory into the arena, sorted: returns where their pointers begin. */
static struct name **read_names(struct walk *walk, DIR *directory, size_t *count)
{
    size_t start = (arena_used + 15) & ~(size_t)15;
    size_t used = start;
    *count = 0;
    for (;;) {
        errno = 0;
        struct dirent *entry = readdir(directory);
        if (!entry) {
            walk->is_cut |= errno != 0;
            break;
        }
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        size_t length = strlen(entry->d_name);
        struct stat facts;
        if (fstatat(dirfd(directory), entry->d_name, &facts, AT_SYMLINK_NOFOLLOW) < 0)
            continue; /* Gone meanwhile. */
        /* The pointer that will be needed for it, and for the alignment of the pointers, is counted already. */
        if (used + sizeof(struct name) + length + 2 + (*count + 2) * sizeof(struct name *) > sizeof arena) {
            walk->is_cut = true;
            break;
        }
        struct name *name = (struct name *)(arena + used);
        name->kind = kind_of(facts.st_mode);
        name->size = (uint64_t)facts.st_size;
        memcpy(name->text, entry->d_name, length + 1);
        if (name->kind == KIND_DIRECTORY)
            strcpy(name->text + length++, "/");
        used += sizeof(struct name) + length + 1;
        ++*count;
    }
    struct name **names = (struct name **)(arena + ((used + 15) & ~(size_t)15));
    if ((uint8_t *)(names + *count) > arena + sizeof arena)
        die("the arena of a walk is miscounted");
    for (size_t i = 0, at = start; i < *count; i++) {
        names[i] = (struct name *)(arena + at);
        at += sizeof(struct name) + strlen(names[i]->text) + 1;
    }
    qsort(names, *count, sizeof *names, by_text);
    arena_used = (size_t)((uint8_t *)(names + *count) - arena);
    return names;
}

/* Visit all beneath the directory that path (length bytes) names; "" is the workspace itself. */
static void walk_directory(struct walk *walk, size_t length)
{
    size_t arena_before = arena_used, count;
    int fd = open_beneath_strict(length ? path : ".", O_RDONLY | O_DIRECTORY | O_NONBLOCK);
    DIR *directory = fd < 0 ? NULL : fdopendir(fd);
    if (!directory) {
        /* Unreadable, or exchanged meanwhile: left out, and said so. */
        walk->is_cut = true;
        if (fd >= 0)
            close(fd);
        return;
    }
    struct name **names = read_names(walk, directory, &count);
    closedir(directory);
    size_t base = length ? length + 1 : 0;
    if (length)
        path[length] = '/';
    for (size_t i = 0; i < count && !(walk->is_cut && walk->room == 0); i++) {
        size_t size = strlen(names[i]->text);
        uint8_t kind = names[i]->kind;
        if (kind == KIND_DIRECTORY)
            size--;
        if (base + size >= sizeof path) {
            walk->is_cut = true;
            continue;
        }
        memcpy(path + base, names[i]->text, size);
        path[base + size] = 0;
        walk->visit(walk, path, kind, names[i]->size);
        bool is_git = size == 4 && memcmp(names[i]->text, ".git", 4) == 0;
        if (kind == KIND_DIRECTORY && walk->is_recursive && !(walk->skip_git && is_git))
            walk_directory(walk, base + size);
    }
    path[length] = 0;
    arena_used = arena_before;
}

/* Bring the request's path into the form the walk builds on: no ".", no doubled slash; symlinks are not followed. */
static size_t set_path(const char *from)
{
    size_t length = 0;
    if (from[0] == '/')
        worker_failed(FAILED, EXDEV, "open");
    while (*from) {
        size_t size = strcspn(from, "/");
        if (size > 0 && !(size == 1 && from[0] == '.')) {
            if (length)
                path[length++] = '/';
            memcpy(path + length, from, size); /* shorter than the request's, which fits */
            length += size;
        }
        from += size + strspn(from + size, "/");
    }
    path[length] = 0;
    return length;
}

static _Noreturn void finish(struct walk *walk, uint8_t type)
{
    uint8_t is_cut = walk->is_cut;
    send_reply(walk);
    packet_send(type, &is_cut, 1);
    _exit(0);
}

static void add_entry(struct walk *walk, const char *at, uint8_t kind, uint64_t size)
{
    if (take_item(walk))
        encode_entry(&walk->reply, kind, size, at);
}

void list_files(const struct list_request *request)
{
    struct walk walk = {
        .is_recursive = request->is_recursive,
        .skip_git = request->skip_git,
        .room = request->max_entries,
        .visit = add_entry,
        .reply = {reply_bytes, sizeof reply_bytes, 0, false},
        .reply_type = ENTRIES,
    };
    size_t length = set_path(request->path);
    int fd = open_beneath_strict(length ? path : ".", O_RDONLY | O_DIRECTORY | O_NONBLOCK);
    if (fd < 0)
        worker_failed(FAILED, errno, "open directory");
    close(fd);
    walk_directory(&walk, length);
    finish(&walk, LIST_DONE);
}

static void match_line(struct walk *walk, const char *at, uint32_t line, size_t start, size_t end)
{
    size_t size = end - start;
    regmatch_t span = {.rm_so = 0, .rm_eo = (regoff_t)size}; /* from 0, or ^ would not match there */
    if (regexec(&walk->pattern, buffer + start, 1, &span, REG_STARTEND) != 0 || !take_item(walk))
        return;
    encode_match(&walk->reply, at, line, buffer + start, size < LINE_MAX_KEPT ? size : LINE_MAX_KEPT);
}

static void search_file(struct walk *walk, const char *at, uint8_t kind, uint64_t size)
{
    struct stat facts;
    (void)size;
    if (kind != KIND_FILE)
        return;
    int fd = open_beneath_strict(at, O_RDONLY | O_NONBLOCK | O_NOCTTY);
    if (fd < 0)
        return; /* Gone, or not for us. */
    bool is_first = true;
    size_t have = 0;
    uint32_t line = 1;
    if (fstat(fd, &facts) < 0 || !S_ISREG(facts.st_mode)) {
        close(fd);
        return;
    }
    while (!(walk->is_cut && walk->room == 0)) {
        ssize_t got = read(fd, buffer + have, sizeof buffer - have);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            break;
        if (is_first && memchr(buffer, 0, (size_t)got < BINARY_BYTES ? (size_t)got : BINARY_BYTES))
            break;
        is_first = false;
        have += (size_t)got;
        size_t start = 0;
        for (char *end; (end = memchr(buffer + start, '\n', have - start));) {
            match_line(walk, at, line++, start, (size_t)(end - buffer));
            start = (size_t)(end - buffer) + 1;
        }
        if (start < have && (got == 0 || (start == 0 && have == sizeof buffer))) {
            match_line(walk, at, line, start, have); /* The last line has no newline, or one is too long. */
            start = have;
        }
        memmove(buffer, buffer + start, have - start);
        have -= start;
        if (got == 0)
            break;
    }
    close(fd);
}

void search_files(const struct search_request *request)
{
    struct walk walk = {
        .is_recursive = true,
        .skip_git = true,
        .room = request->max_matches,
        .visit = search_file,
        .reply = {reply_bytes, sizeof reply_bytes, 0, false},
        .reply_type = MATCHES,
    };
    int error = regcomp(&walk.pattern, request->pattern, REG_EXTENDED);
    if (error) {
        char what[128];
        regerror(error, &walk.pattern, what, sizeof what);
        worker_failed(FAILED, EINVAL, what);
    }
    struct stat facts;
    size_t length = set_path(request->path);
    int fd = open_beneath_strict(length ? path : ".", O_PATH);
    if (fd < 0 || fstat(fd, &facts) < 0)
        worker_failed(FAILED, errno, "open");
    close(fd);
    if (S_ISDIR(facts.st_mode))
        walk_directory(&walk, length);
    else
        search_file(&walk, path, kind_of(facts.st_mode), (uint64_t)facts.st_size);
    finish(&walk, SEARCH_DONE);
}
