/* A shared object for the self-test: loaded into a program, it ends that with status 42 before its first line. */
#include <sys/syscall.h>

static void end(void)
{
#if defined(__x86_64__)
    __asm__ volatile("syscall" : : "a"(SYS_exit_group), "D"(42) : "rcx", "r11", "memory");
#elif defined(__aarch64__)
    register long status __asm__("x0") = 42, call __asm__("x8") = SYS_exit_group;
    __asm__ volatile("svc 0" : : "r"(status), "r"(call) : "memory");
#else
#error "no way to end a process is known here"
#endif
}

__attribute__((section(".init_array"), used)) static void (*const at_load)(void) = end;
