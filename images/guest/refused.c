/* Stands in the place of a program the policy blocks: says so, and fails. Whoever calls it chooses argv[0]. */
#include <stdio.h>
#include <string.h>

int main(int argc, char **argv)
{
    const char *name = argc > 0 && argv[0] ? argv[0] : "?";
    const char *slash = strrchr(name, '/');
    fputs("agent-runner: '", stderr);
    int left = 128;
    for (const unsigned char *c = (const unsigned char *)(slash ? slash + 1 : name); *c && left > 0; c++, left--) {
        /* Control characters and anything not ASCII could drive the terminal this is shown on. */
        if (*c < 32 || *c > 126 || *c == '\'' || *c == '\\')
            fprintf(stderr, "\\x%02x", *c);
        else
            fputc(*c, stderr);
    }
    fputs("' is blocked by policy (shell.blocked_commands)\n", stderr);
    return 126;
}
