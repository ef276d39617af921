/*
 * A program, or a library, that is not from the image: says so and ends. No libc, so that it runs anywhere and its
 * bytes are few enough to be carried in a script.
 */
static long call(long number, long a, long b, long c)
{
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}

static void say(void)
{
    static const char text[] = "attack-ran\n";
    call(1, 1, (long)text, sizeof text - 1); /* write */
    call(231, 0, 0, 0);                      /* exit_group */
}

#ifdef LIBRARY
__attribute__((constructor)) static void start(void) { say(); }
#else
void _start(void) { say(); }
#endif
