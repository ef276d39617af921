/* Read and write frames. Pure: no system calls, no memory of its own; what it is given may be hostile. */
#include "protocol.h"

#include <string.h>

struct reader {
    const uint8_t *at;
    size_t left;
    bool is_bad;
};

static uint64_t get_number(struct reader *reader, unsigned bytes)
{
    if (reader->is_bad || reader->left < bytes) {
        reader->is_bad = true;
        return 0;
    }
    uint64_t value = 0;
    for (unsigned i = 0; i < bytes; i++)
        value = value << 8 | reader->at[i];
    reader->at += bytes;
    reader->left -= bytes;
    return value;
}

static uint8_t get_flag(struct reader *reader)
{
    uint64_t value = get_number(reader, 1);
    if (value > 1)
        reader->is_bad = true;
    return (uint8_t)value;
}

static struct span get_bytes(struct reader *reader)
{
    struct span span = {reader->at, (size_t)get_number(reader, 4)};
    if (reader->is_bad || reader->left < span.size) {
        reader->is_bad = true;
        return (struct span){NULL, 0};
    }
    span.at = reader->at;
    reader->at += span.size;
    reader->left -= span.size;
    return span;
}

static const char *get_text(struct reader *reader, size_t limit)
{
    struct span span = get_bytes(reader);
    if (reader->is_bad || span.size == 0 || span.size > limit
        || memchr(span.at, 0, span.size) != span.at + span.size - 1) {
        reader->is_bad = true;
        return "";
    }
    return (const char *)span.at;
}

static bool is_read_whole(const struct reader *reader)
{
    return !reader->is_bad && reader->left == 0;
}

int frame_take(const uint8_t *at, size_t have, struct frame *frame, size_t *used)
{
    struct reader reader = {at, have, false};
    if (have < 4)
        return 0;
    uint64_t length = get_number(&reader, 4);
    if (length < FRAME_HEAD - 4 || length > FRAME_MAX)
        return -1; /* Judged before the rest came: a lie about the length must not make anyone wait. */
    if (reader.left < length)
        return 0;
    frame->type = (uint8_t)get_number(&reader, 1);
    frame->id = (uint32_t)get_number(&reader, 4);
    frame->body = (struct span){reader.at, (size_t)length - (FRAME_HEAD - 4)};
    *used = 4 + (size_t)length;
    return 1;
}

static bool get_paths(struct reader *reader, struct path_list *list, bool may_have_some)
{
    uint64_t count = get_number(reader, 4);
    if (reader->is_bad || count > (may_have_some ? RULES_MAX : 0))
        return false;
    list->count = (uint32_t)count;
    for (uint32_t i = 0; i < list->count; i++) {
        list->paths[i] = get_text(reader, PATH_LIMIT);
        if (list->paths[i][0] != '/') /* also what could not be read */
            return false;
    }
    return true;
}

bool decode_config(struct span body, struct config *config)
{
    struct reader reader = {body.at, body.size, false};
    if (get_number(&reader, 2) != PROTOCOL_VERSION)
        return false;
    config->workspace = get_text(&reader, PATH_LIMIT);
    config->egress = get_text(&reader, 108); /* sun_path */
    uint64_t count = get_number(&reader, 4);
    if (reader.is_bad || count > RELAYS_MAX || config->workspace[0] != '/')
        return false;
    config->relay_count = (uint32_t)count;
    for (uint32_t i = 0; i < config->relay_count; i++) {
        config->relays[i].address = get_text(&reader, 16);
        config->relays[i].port = (uint16_t)get_number(&reader, 2);
        config->relays[i].connect = get_text(&reader, 262);
        if (reader.is_bad || config->relays[i].port == 0)
            return false;
        /* The name becomes part of a request line: nothing that could start another line or field. */
        for (const char *c = config->relays[i].connect; *c; c++)
            if (*c <= ' ' || *c >= 127)
                return false;
    }
    struct exec_rules *rules = &config->rules;
    rules->is_given = get_flag(&reader);
    return get_paths(&reader, &rules->executable, rules->is_given)
           && get_paths(&reader, &rules->readable, rules->is_given)
           && get_paths(&reader, &rules->writable, rules->is_given)
           && (config->must_observe = get_flag(&reader), is_read_whole(&reader))
           && (config->relay_count == 0 || config->egress[0] != 0);
}

static bool get_texts(struct reader *reader, char **texts, uint32_t limit)
{
    uint64_t count = get_number(reader, 4);
    if (reader->is_bad || count > limit)
        return false;
    for (uint64_t i = 0; i < count; i++)
        texts[i] = (char *)(uintptr_t)get_text(reader, FRAME_MAX); /* execve takes char *; it writes nothing */
    texts[count] = NULL;
    return !reader->is_bad;
}

bool decode_spawn(struct span body, struct spawn *spawn)
{
    struct reader reader = {body.at, body.size, false};
    if (!get_texts(&reader, spawn->argv, ARGS_MAX) || spawn->argv[0] == NULL)
        return false;
    spawn->cwd = get_text(&reader, PATH_LIMIT);
    if (!get_texts(&reader, spawn->env, ENV_MAX))
        return false;
    spawn->stdin_size = get_number(&reader, 8);
    spawn->stdin_first = get_bytes(&reader);
    spawn->timeout_ms = (uint32_t)get_number(&reader, 4);
    spawn->max_output = get_number(&reader, 8);
    return is_read_whole(&reader) && spawn->stdin_first.size <= spawn->stdin_size && spawn->timeout_ms > 0;
}

bool decode_read(struct span body, struct read_request *request)
{
    struct reader reader = {body.at, body.size, false};
    request->path = get_text(&reader, PATH_LIMIT);
    request->offset = get_number(&reader, 8);
    request->max_bytes = get_number(&reader, 8);
    return is_read_whole(&reader);
}

bool decode_write(struct span body, struct write_request *request)
{
    struct reader reader = {body.at, body.size, false};
    request->path = get_text(&reader, PATH_LIMIT);
    request->must_create = get_flag(&reader);
    request->size = get_number(&reader, 8);
    request->first = get_bytes(&reader);
    return is_read_whole(&reader) && request->first.size <= request->size;
}

bool decode_list(struct span body, struct list_request *request)
{
    struct reader reader = {body.at, body.size, false};
    request->path = get_text(&reader, PATH_LIMIT);
    request->is_recursive = get_flag(&reader);
    request->skip_git = get_flag(&reader);
    request->max_entries = (uint32_t)get_number(&reader, 4);
    return is_read_whole(&reader);
}

bool decode_search(struct span body, struct search_request *request)
{
    struct reader reader = {body.at, body.size, false};
    request->pattern = get_text(&reader, 64 * 1024);
    request->path = get_text(&reader, PATH_LIMIT);
    request->max_matches = (uint32_t)get_number(&reader, 4);
    return is_read_whole(&reader);
}

static uint8_t *take_room(struct writer *writer, size_t size)
{
    if (writer->is_full || writer->size - writer->used < size) {
        writer->is_full = true;
        return NULL;
    }
    uint8_t *at = writer->at + writer->used;
    writer->used += size;
    return at;
}

static void write_number(uint8_t *at, uint64_t value, unsigned bytes)
{
    for (unsigned i = 0; i < bytes; i++)
        at[i] = (uint8_t)(value >> (8 * (bytes - 1 - i)));
}

void put_number(struct writer *writer, uint64_t value, unsigned bytes)
{
    uint8_t *at = take_room(writer, bytes);
    if (at)
        write_number(at, value, bytes);
}

void put_bytes(struct writer *writer, const void *from, size_t size)
{
    put_number(writer, size, 4);
    uint8_t *at = take_room(writer, size);
    if (at && size > 0)
        memcpy(at, from, size);
}

void put_text(struct writer *writer, const char *text)
{
    put_bytes(writer, text, strlen(text) + 1);
}

void encode_head(uint8_t head[FRAME_HEAD], uint8_t type, uint32_t id, size_t body_size)
{
    write_number(head, body_size + FRAME_HEAD - 4, 4);
    head[4] = type;
    write_number(head + 5, id, 4);
}

void encode_ready(struct writer *writer, uint32_t landlock_abi, uint32_t uid)
{
    put_number(writer, PROTOCOL_VERSION, 2);
    put_number(writer, landlock_abi, 4);
    put_number(writer, uid, 4);
    put_text(writer, GUEST_VERSION);
}

void encode_exited(struct writer *writer, const struct exited *exited)
{
    put_number(writer, exited->is_signal, 1);
    put_number(writer, exited->value, 1);
    put_number(writer, exited->flags, 1);
    put_number(writer, exited->stdout_size, 8);
    put_number(writer, exited->stderr_size, 8);
    put_number(writer, exited->wall_ms, 4);
    put_number(writer, exited->cpu_ms, 4);
    put_number(writer, exited->max_rss, 8);
    put_number(writer, exited->execs_left_out, 8);
}

void encode_exec(struct writer *writer, const struct exec_seen *seen)
{
    put_number(writer, seen->pid, 4);
    put_number(writer, seen->parent, 4);
    put_bytes(writer, seen->path.at, seen->path.size);
    put_bytes(writer, seen->found.at, seen->found.size);
    put_number(writer, seen->argument_count, 4);
    for (uint32_t i = 0; i < seen->argument_count; i++)
        put_bytes(writer, seen->arguments[i].at, seen->arguments[i].size);
    put_number(writer, seen->is_cut, 1);
}

void encode_failed(struct writer *writer, uint32_t error, const char *what)
{
    put_number(writer, error, 4);
    put_text(writer, what);
}

void encode_entry(struct writer *writer, uint8_t kind, uint64_t size, const char *path)
{
    put_number(writer, kind, 1);
    put_number(writer, size, 8);
    put_text(writer, path);
}

void encode_match(struct writer *writer, const char *path, uint32_t line, const void *text, size_t size)
{
    put_text(writer, path);
    put_number(writer, line, 4);
    put_bytes(writer, text, size);
}
