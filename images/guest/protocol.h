/*
 * The wire between host and guest, in full. sandbox/guest/codec.py is its mirror; tests/unit/guest/vectors.json
 * is checked against both.
 *
 * Frame:   u32 length of all that follows (5..FRAME_MAX) | u8 type | u32 request id | body
 * Numbers: big-endian, unsigned.
 * text:    u32 length | that many bytes, the last and only the last of them NUL. C uses it in place.
 * bytes:   u32 length | that many bytes.
 * list:    u32 count | items.
 * A body is read to its last byte; anything missing, left over or out of bounds is garbage and ends the reader.
 *
 * Host to guest. Ids of new requests only rise; id 0 belongs to CONFIG.
 *   CONFIG  u16 protocol version | text workspace | text egress socket ("" for none)
 *           | list of (text IPv4 address, u16 port, text "name:port" or "")
 *           | u8 has rules | list of text executable | list of text readable | list of text writable
 *           | u8 must observe execs                                                   once, first
 *   SPAWN   list of text argv (at least one) | text cwd | list of text "NAME=value"
 *           | u64 stdin size | bytes first part of stdin | u32 timeout ms | u64 output cap per stream
 *   DATA    the next part of stdin or content, 1..DATA_MAX bytes; one part for each WANT
 *   KILL    empty; ends a request. For an id that has ended it means nothing (the two crossed).
 *   READ    text path | u64 offset | u64 most bytes
 *   WRITE   text path | u8 must create | u64 size | bytes first part
 *   LIST    text path | u8 recursive | u8 skip .git | u32 most entries
 *   SEARCH  text pattern (POSIX extended) | text path | u32 most matches
 *
 * Guest to host. Each request gets exactly one last frame (marked *), and nothing after it.
 *   READY *        u16 protocol version | u32 Landlock ABI | u32 uid | text version
 *   STARTED        u32 pid; after exec worked; no output before it
 *   EXECS          one or more (u32 pid, u32 parent, bytes path, bytes where it leads ("" for the same or unknown),
 *                  list of bytes argv, u8 1 if argv is not whole); those before EXITED are all
 *   STDOUT STDERR  1..CHUNK_MAX bytes of kept output
 *   EXITED *       u8 1 if a signal ended it | u8 exit status or signal | u8 flags | u64 stdout size
 *                  | u64 stderr size | u32 wall ms | u32 cpu ms | u64 peak resident bytes | u64 execs left out
 *   SPAWN_FAILED * u32 errno | text what failed
 *   WANT           empty; the next DATA may come
 *   CONTENT        1..CHUNK_MAX bytes of a file
 *   READ_DONE *    u64 file size
 *   WRITE_DONE *   empty
 *   ENTRIES        one or more (u8 kind, u64 size, text path)
 *   LIST_DONE *    u8 1 if entries were left out
 *   MATCHES        one or more (text path, u32 line, bytes line cut to LINE_MAX_KEPT)
 *   SEARCH_DONE *  u8 1 if matches were left out
 *   FAILED *       u32 errno | text what failed
 * A CONFIG that cannot be met has no answer: the guest says why on stderr and ends.
 */
#ifndef AGENT_RUNNER_PROTOCOL_H
#define AGENT_RUNNER_PROTOCOL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define GUEST_VERSION "1"
#define PROTOCOL_VERSION 2
#define FRAME_MAX (1u << 20)
#define FRAME_HEAD 9u
#define DATA_MAX (64u * 1024)
#define CHUNK_MAX (32u * 1024)
#define LINE_MAX_KEPT 400u
#define PATH_LIMIT 4096u /* with the NUL, as in the kernel */
#define ARGS_MAX 16384u
#define ENV_MAX 4096u
#define RELAYS_MAX 256u
#define RULES_MAX 4096u /* paths of one list of rules */
#define EXECS_MAX 10000u /* of one command; more are only counted */
#define EXEC_PATH_MAX 1024u
#define EXEC_ARGS_MAX 32u
#define EXEC_ARG_MAX 256u

enum type {
    CONFIG = 1, SPAWN = 2, DATA = 3, KILL = 4, READ = 5, WRITE = 6, LIST = 7, SEARCH = 8,
    READY = 65, STARTED = 66, STDOUT = 67, STDERR = 68, EXITED = 69, SPAWN_FAILED = 70, WANT = 71,
    CONTENT = 72, READ_DONE = 73, WRITE_DONE = 74, ENTRIES = 75, LIST_DONE = 76, MATCHES = 77,
    SEARCH_DONE = 78, FAILED = 79, EXECS = 80,
};

enum { EXIT_TIMED_OUT = 1, EXIT_KEEPER_LOST = 2 }; /* flags of EXITED */
enum { KIND_FILE = 0, KIND_DIRECTORY = 1, KIND_SYMLINK = 2, KIND_OTHER = 3 };

struct span {
    const uint8_t *at;
    size_t size;
};

struct frame {
    uint8_t type;
    uint32_t id;
    struct span body;
};

struct relay_request {
    const char *address;
    uint16_t port;
    const char *connect; /* "" for a plain relay */
};

struct path_list {
    const char *paths[RULES_MAX]; /* absolute */
    uint32_t count;
};

struct exec_rules {
    uint8_t is_given; /* 0: the lists are empty and mean nothing */
    struct path_list executable, readable, writable;
};

struct config {
    const char *workspace;
    const char *egress;
    struct relay_request relays[RELAYS_MAX];
    uint32_t relay_count;
    struct exec_rules rules;
    uint8_t must_observe;
};

struct spawn {
    char *argv[ARGS_MAX + 1]; /* NULL-terminated, as is env */
    char *env[ENV_MAX + 1];
    const char *cwd;
    uint64_t stdin_size;
    struct span stdin_first;
    uint32_t timeout_ms;
    uint64_t max_output;
};

struct read_request {
    const char *path;
    uint64_t offset, max_bytes;
};

struct write_request {
    const char *path;
    uint8_t must_create;
    uint64_t size;
    struct span first;
};

struct list_request {
    const char *path;
    uint8_t is_recursive, skip_git;
    uint32_t max_entries;
};

struct search_request {
    const char *pattern, *path;
    uint32_t max_matches;
};

struct exited {
    uint8_t is_signal, value, flags;
    uint64_t stdout_size, stderr_size;
    uint32_t wall_ms, cpu_ms;
    uint64_t max_rss, execs_left_out;
};

struct exec_seen {
    uint32_t pid, parent;
    struct span path, found;
    struct span arguments[EXEC_ARGS_MAX];
    uint32_t argument_count;
    bool is_cut;
};

/* Take one frame from the front of what was read: 1 and *used when one is whole, 0 when more is needed, -1 for
 * garbage. The frame points into at. */
int frame_take(const uint8_t *at, size_t have, struct frame *frame, size_t *used);

/* Read a body; false for garbage. The results point into the body. */
bool decode_config(struct span body, struct config *config);
bool decode_spawn(struct span body, struct spawn *spawn);
bool decode_read(struct span body, struct read_request *request);
bool decode_write(struct span body, struct write_request *request);
bool decode_list(struct span body, struct list_request *request);
bool decode_search(struct span body, struct search_request *request);

/* A body being written. Writing past the end sets is_full and writes nothing. */
struct writer {
    uint8_t *at;
    size_t size, used;
    bool is_full;
};

void put_number(struct writer *writer, uint64_t value, unsigned bytes);
void put_bytes(struct writer *writer, const void *at, size_t size);
void put_text(struct writer *writer, const char *text);
void encode_head(uint8_t head[FRAME_HEAD], uint8_t type, uint32_t id, size_t body_size);
void encode_ready(struct writer *writer, uint32_t landlock_abi, uint32_t uid);
void encode_exited(struct writer *writer, const struct exited *exited);
void encode_exec(struct writer *writer, const struct exec_seen *seen);
void encode_failed(struct writer *writer, uint32_t error, const char *what);
void encode_entry(struct writer *writer, uint8_t kind, uint64_t size, const char *path);
void encode_match(struct writer *writer, const char *path, uint32_t line, const void *text, size_t size);

#endif
