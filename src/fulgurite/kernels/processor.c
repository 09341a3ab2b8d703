/* Which of the processor's units products in bfloat16 are for. */
#ifdef __x86_64__
#include <sys/syscall.h>
#include <unistd.h>

/* Whether it has matrix tiles, and the system lets this process use them. */
int has_tiles(void) {
    const long request = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    __builtin_cpu_init();
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           __builtin_cpu_supports("avx512bf16") && !syscall(SYS_arch_prctl, request, tile_data);
}

/* Whether its vectors multiply bfloat16. */
int has_vectors(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16");
}
#else
int has_tiles(void) { return 0; }
int has_vectors(void) { return 0; }
#endif
