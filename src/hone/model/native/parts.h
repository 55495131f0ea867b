/* Work in parts over threads, and memory that each thread keeps between calls. */
#pragma once

enum scratch_slot {
    SCRATCH_WEIGHTS,
    SCRATCH_WEIGHTS_2,
    SCRATCH_LEFT,
    SCRATCH_RIGHT,
    SCRATCH_ROWS,
    SCRATCH_HIDDEN,
    SCRATCH_ACTIVE,
    SCRATCH_OUTPUT,
    SCRATCH_ORDER,
    SCRATCH_ROUTE,
    SCRATCH_GRADIENT,
    SCRATCH_GRADIENT_2,
    SCRATCH_SLOTS
};

/* At least `floats` floats, aligned to 64 bytes, valid until this thread asks for the same slot again. */
float *scratch(enum scratch_slot slot, long floats);

/* The next piece of work: pieces are handed out in order, each to one part. */
long next_piece(long *taken);

/* run(work, part, parts) for each part, side by side when parts > 1. */
void in_parts(void (*run)(void *work, int part, int parts), void *work, int parts);
