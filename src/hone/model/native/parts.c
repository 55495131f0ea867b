#include "parts.h"
#include <pthread.h>
#include <stdlib.h>

struct arena {
    float *memory[SCRATCH_SLOTS];
    long size[SCRATCH_SLOTS];
};

static pthread_key_t arena_key;
static pthread_once_t arena_once = PTHREAD_ONCE_INIT;
static __thread struct arena *own;

static void free_arena(void *given) {
    struct arena *arena = given;
    for (int slot = 0; slot < SCRATCH_SLOTS; slot++) free(arena->memory[slot]);
    free(arena);
}

static void make_key(void) { pthread_key_create(&arena_key, free_arena); }

static void make_arena(void) {
    pthread_once(&arena_once, make_key);
    own = calloc(1, sizeof *own);
    if (!own) abort();
    pthread_setspecific(arena_key, own);
}

float *scratch(enum scratch_slot slot, long floats) {
    if (!own) make_arena();
    if (own->size[slot] < floats) {
        free(own->memory[slot]);
        own->size[slot] = (floats + floats / 2 + 1023) / 1024 * 1024;
        own->memory[slot] = aligned_alloc(64, 4 * own->size[slot]);
        if (!own->memory[slot]) abort();
    }
    return own->memory[slot];
}

long next_piece(long *taken) { return __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED); }

void in_parts(void (*run)(void *work, int part, int parts), void *work, int parts) {
#ifdef _OPENMP
    if (parts > 1) {
#pragma omp parallel for num_threads(parts) schedule(static, 1)
        for (int part = 0; part < parts; part++) run(work, part, parts);
        return;
    }
#endif
    for (int part = 0; part < parts; part++) run(work, part, parts);
}
