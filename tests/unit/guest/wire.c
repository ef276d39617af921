/*
 * The C side of the wire, driven by the tests.
 *
 *   wire decode   lines of hex frames, host to guest  -> one line each: what was read from it, or "garbage"
 *   wire encode   lines "ready 7 1000" and the like    -> hex of the frame body the guest would send
 *   wire fuzz N   N frames, mutated from those on stdin (hex), through the parser; ends 0 or is ended by a sanitizer
 */
#include "protocol.h"

#include <ctype.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LINE_BYTES (128u * 1024)

static uint8_t buffer[2 * FRAME_MAX];

static size_t from_hex(const char *hex, uint8_t *to)
{
    size_t size = 0;
    unsigned value;
    while (isxdigit((unsigned char)hex[0]) && sscanf(hex, "%2x", &value) == 1) {
        to[size++] = (uint8_t)value;
        hex += 2;
    }
    return size;
}

static void print_hex(const void *at, size_t size)
{
    for (size_t i = 0; i < size; i++)
        printf("%02x", ((const uint8_t *)at)[i]);
}

static void print_text(const char *name, const char *text)
{
    printf(" %s=", name);
    print_hex(text, strlen(text));
}

static void print_paths(const char *name, const struct path_list *list)
{
    for (uint32_t i = 0; i < list->count; i++)
        print_text(name, list->paths[i]);
}

static struct config config;
static struct spawn spawn;

/* Read a body as the guest would, touching every byte of the result so that a sanitizer sees what is out of bounds. */
static bool show(const struct frame *frame, bool is_silent)
{
    struct read_request read;
    struct write_request write;
    struct list_request list;
    struct search_request search;
    FILE *real = stdout;
    bool is_good = false;
    if (is_silent)
        stdout = fopen("/dev/null", "w");
    switch (frame->type) {
    case CONFIG:
        if ((is_good = decode_config(frame->body, &config))) {
            printf("CONFIG %u", frame->id);
            print_text("workspace", config.workspace);
            print_text("egress", config.egress);
            for (uint32_t i = 0; i < config.relay_count; i++) {
                print_text("address", config.relays[i].address);
                printf(" port=%u", config.relays[i].port);
                print_text("connect", config.relays[i].connect);
            }
            printf(" has_rules=%u", config.rules.is_given);
            print_paths("executable", &config.rules.executable);
            print_paths("readable", &config.rules.readable);
            print_paths("writable", &config.rules.writable);
            printf(" must_observe=%u", config.must_observe);
        }
        break;
    case SPAWN:
        if ((is_good = decode_spawn(frame->body, &spawn))) {
            printf("SPAWN %u", frame->id);
            for (char **arg = spawn.argv; *arg; arg++)
                print_text("arg", *arg);
            print_text("cwd", spawn.cwd);
            for (char **env = spawn.env; *env; env++)
                print_text("env", *env);
            printf(" stdin_size=%" PRIu64 " first=", spawn.stdin_size);
            print_hex(spawn.stdin_first.at, spawn.stdin_first.size);
            printf(" timeout_ms=%" PRIu32 " max_output=%" PRIu64, spawn.timeout_ms, spawn.max_output);
        }
        break;
    case READ:
        if ((is_good = decode_read(frame->body, &read))) {
            printf("READ %u", frame->id);
            print_text("path", read.path);
            printf(" offset=%" PRIu64 " max_bytes=%" PRIu64, read.offset, read.max_bytes);
        }
        break;
    case WRITE:
        if ((is_good = decode_write(frame->body, &write))) {
            printf("WRITE %u", frame->id);
            print_text("path", write.path);
            printf(" must_create=%u size=%" PRIu64 " first=", write.must_create, write.size);
            print_hex(write.first.at, write.first.size);
        }
        break;
    case LIST:
        if ((is_good = decode_list(frame->body, &list))) {
            printf("LIST %u", frame->id);
            print_text("path", list.path);
            printf(" is_recursive=%u skip_git=%u max_entries=%" PRIu32, list.is_recursive, list.skip_git,
                   list.max_entries);
        }
        break;
    case SEARCH:
        if ((is_good = decode_search(frame->body, &search))) {
            printf("SEARCH %u", frame->id);
            print_text("pattern", search.pattern);
            print_text("path", search.path);
            printf(" max_matches=%" PRIu32, search.max_matches);
        }
        break;
    case DATA:
    case KILL:
        is_good = true;
        printf("%s %u body=", frame->type == DATA ? "DATA" : "KILL", frame->id);
        print_hex(frame->body.at, frame->body.size);
        break;
    default:
        break;
    }
    if (is_silent) {
        fclose(stdout);
        stdout = real;
    }
    return is_good;
}

static void decode(const char *line)
{
    struct frame frame;
    size_t used, have = from_hex(line, buffer);
    int taken = frame_take(buffer, have, &frame, &used);
    if (taken != 1 || used != have || !show(&frame, false))
        fputs(taken == 0 ? "incomplete" : "garbage", stdout);
    putchar('\n');
}

static void encode(char *line)
{
    uint8_t room[8192], head[FRAME_HEAD];
    struct writer body = {room, sizeof room, 0, false};
    uint64_t n[10] = {0};
    char text[1024] = "";
    unsigned type = 0, id = 0;
    char *rest = strchr(line, '|');
    if (rest) {
        *rest++ = 0;
        text[from_hex(rest, (uint8_t *)text)] = 0;
    }
    int count = sscanf(line,
                       "%u %u %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64
                       " %" SCNu64 " %" SCNu64,
                       &type, &id, n, n + 1, n + 2, n + 3, n + 4, n + 5, n + 6, n + 7, n + 8);
    (void)count;
    struct exited exited = {(uint8_t)n[0], (uint8_t)n[1], (uint8_t)n[2], n[3], n[4], (uint32_t)n[5], (uint32_t)n[6],
                            n[7], n[8]};
    struct span shown = {(const uint8_t *)text, strlen(text)};
    struct exec_seen seen = {.path = shown, .found = {shown.at, 1}, .arguments = {shown, {0}}, .argument_count = 2};
    switch (type) {
    case READY: encode_ready(&body, (uint32_t)n[0], (uint32_t)n[1]); break;
    case STARTED: put_number(&body, n[0], 4); break;
    case EXITED: encode_exited(&body, &exited); break;
    case SPAWN_FAILED:
    case FAILED: encode_failed(&body, (uint32_t)n[0], text); break;
    case READ_DONE: put_number(&body, n[0], 8); break;
    case ENTRIES: encode_entry(&body, (uint8_t)n[0], n[1], text); break;
    case MATCHES: encode_match(&body, text, (uint32_t)n[0], "line", 4); break;
    case EXECS:
        seen.pid = (uint32_t)n[0];
        seen.parent = (uint32_t)n[1];
        encode_exec(&body, &seen);
        seen.argument_count = 0;
        seen.is_cut = true;
        encode_exec(&body, &seen);
        break;
    case LIST_DONE:
    case SEARCH_DONE: put_number(&body, n[0], 1); break;
    case STDOUT:
    case STDERR:
    case CONTENT:
        memcpy(room, text, strlen(text));
        body.used = strlen(text);
        break;
    default: break; /* WANT, WRITE_DONE: empty */
    }
    encode_head(head, (uint8_t)type, id, body.used);
    print_hex(head, sizeof head);
    print_hex(room, body.used);
    putchar('\n');
}

static uint32_t random_state = 1;

static uint32_t next_random(void) /* xorshift: the same run every time */
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    return random_state ^= random_state << 5;
}

static void fuzz(long rounds, char (*seeds)[LINE_BYTES], size_t seed_count)
{
    static uint8_t bytes[8192];
    long accepted = 0;
    for (long round = 0; round < rounds; round++) {
        size_t size = from_hex(seeds[next_random() % seed_count], bytes), used;
        for (uint32_t edits = next_random() % 6; edits > 0 && size > 0; edits--) {
            size_t at = next_random() % size;
            switch (next_random() % 4) {
            case 0: bytes[at] = (uint8_t)next_random(); break;
            case 1: bytes[at] ^= (uint8_t)(1u << next_random() % 8); break;
            case 2: size = at; break;
            default: bytes[at] = next_random() % 2 ? 0xff : 0; break;
            }
        }
        if (size >= 4 && next_random() % 2) /* half of them with a length that fits, to get behind that check */
            for (int i = 0; i < 4; i++)
                bytes[i] = (uint8_t)((size - 4) >> (24 - 8 * i));
        /* An own allocation of the exact size: one byte too far is seen. */
        uint8_t *exact = malloc(size ? size : 1);
        if (!exact)
            abort();
        memcpy(exact, bytes, size);
        struct frame frame;
        if (frame_take(exact, size, &frame, &used) == 1 && show(&frame, true))
            accepted++;
        free(exact);
    }
    printf("%ld of %ld accepted\n", accepted, rounds);
}

int main(int argc, char **argv)
{
    static char lines[64][LINE_BYTES];
    size_t count = 0;
    while (count < 64 && fgets(lines[count], sizeof lines[count], stdin))
        count++;
    if (argc == 3 && strcmp(argv[1], "fuzz") == 0 && count > 0) {
        fuzz(atol(argv[2]), lines, count);
        return 0;
    }
    for (size_t i = 0; i < count && argc == 2; i++) {
        if (strcmp(argv[1], "decode") == 0)
            decode(lines[i]);
        else
            encode(lines[i]);
    }
    return 0;
}
