# Compile and run: dynamic, static, with link-time optimisation.
set -eu
cat > hello.c <<'C'
#include <pthread.h>
#include <stdio.h>
static void *nothing(void *argument) { return argument; }
int main(void)
{
    pthread_t thread;
    if (pthread_create(&thread, 0, nothing, 0) || pthread_join(thread, 0))
        return 1;
    return puts("hello") < 0;
}
C
for flags in "-O2 -pipe" "-static" "-flto -g"; do
    gcc -Wall -pthread $flags hello.c -o hello
    test "$(./hello)" = hello
done
