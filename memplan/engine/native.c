/* The model of torch's caching allocator in C: the decisions of allocator.py, whose docstrings explain them, for
 * replays of millions of events. tests/engine/test_native.py holds both to each other.
 *
 * replay() is the entry point of complete runs, largest() compares moments (largest.py). FULL equals NONE: the block of
 * a storage that did not fit.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { FREED = -1, RELEASED = -2, FULL = -1, EMPTY = -2, NONE = -1 };
static const int64_t MIB = 1 << 20, MOST = (int64_t)1 << 61; /* bytes reserved that are still counted exactly */

typedef struct { int64_t start, size; int32_t before, after; int16_t pool; int16_t is_free; } Block;
typedef struct { int64_t size, start; int32_t block; } Free;
typedef struct Chunk { struct Chunk *spare; int32_t count; Free free[32]; } Chunk;
typedef struct { Chunk **chunks; int32_t count, room; } Bin; /* free blocks of similar sizes, by size, then start */
enum { BINS = 256 };
typedef struct { int64_t end; int32_t last, is_small; Chunk *spare; uint64_t filled[BINS / 64]; Bin bins[BINS]; } Pool;
typedef struct { Bin *bin; int32_t chunk, index; } Place;
typedef struct {
    /* read by native.py */
    int64_t allocated, reserved, peak_allocated, peak_reserved, requests, refused, capacity, missing;
    int32_t expandable, pool_count, block_count, block_room, unused;
    Pool *pools;
    Block *blocks;
} Allocator;

/* free blocks of a pool: in bins of similar sizes, four to each power of two, which are mostly short. In a bin they are
 * sorted, in chunks, because mixtures of experts leave hundreds of thousands of one size */

static inline int bin_of(int64_t size) {
    uint64_t units = (uint64_t)size >> 7; /* sizes are multiples of 512 */
    int shift = 61 - __builtin_clzll(units);
    return 4 * shift + (int)(units >> shift) - 4;
}

static inline int is_less(const Free *f, int64_t size, int64_t start) {
    return f->size < size || (f->size == size && (uint64_t)f->start < (uint64_t)start); /* a start of 0 is the least */
}

static inline Place find(Pool *p, int64_t size, int64_t start) { /* of the first that is not less, or its bin's end */
    Bin *bin = &p->bins[bin_of(size)];
    Place at = {bin, 0, 0};
    if (!bin->count) return at;
    for (int32_t high = bin->count - 1; at.chunk < high;) {
        int32_t middle = (at.chunk + high) / 2;
        const Chunk *c = bin->chunks[middle];
        if (is_less(&c->free[c->count - 1], size, start)) at.chunk = middle + 1; else high = middle;
    }
    const Chunk *c = bin->chunks[at.chunk];
    while (at.index < c->count && is_less(&c->free[at.index], size, start)) at.index++;
    return at;
}

static inline Bin *bin_after(Pool *p, const Bin *bin) { /* that has blocks, or NULL */
    for (uint32_t n = (uint32_t)(bin - p->bins) + 1; n < BINS; n = (n | 63) + 1) {
        uint64_t filled = p->filled[n / 64] >> n % 64;
        if (filled) return &p->bins[n + __builtin_ctzll(filled)];
    }
    return NULL;
}

static inline void toggle_filled(Pool *p, const Bin *bin) {
    uint32_t n = (uint32_t)(bin - p->bins);
    p->filled[n / 64] ^= (uint64_t)1 << n % 64;
}

static inline void delete_at(Pool *p, Place at) { /* a bin keeps its last chunk, which may be empty */
    Bin *bin = at.bin;
    Chunk *c = bin->chunks[at.chunk];
    if (--c->count > at.index)
        memmove(c->free + at.index, c->free + at.index + 1, (size_t)(c->count - at.index) * sizeof(Free));
    if (c->count) return;
    if (bin->count == 1) { toggle_filled(p, bin); return; }
    c->spare = p->spare;
    p->spare = c;
    memmove(bin->chunks + at.chunk, bin->chunks + at.chunk + 1, (size_t)(--bin->count - at.chunk) * sizeof(Chunk *));
}

static Chunk *insert_chunk(Pool *p, Bin *bin, int32_t at) {
    if (bin->count == bin->room)
        bin->chunks = realloc(bin->chunks, (size_t)(bin->room = 2 * bin->room + 4) * sizeof(Chunk *));
    memmove(bin->chunks + at + 1, bin->chunks + at, (size_t)(bin->count++ - at) * sizeof(Chunk *));
    Chunk *c = p->spare;
    if (c) p->spare = c->spare; else c = malloc(sizeof(Chunk));
    c->count = 0;
    return bin->chunks[at] = c;
}

static inline void insert(Pool *p, Free f) {
    Place at = find(p, f.size, f.start);
    Chunk *c = at.bin->count ? at.bin->chunks[at.chunk] : insert_chunk(p, at.bin, 0);
    int32_t half = sizeof c->free / sizeof(Free) / 2;
    if (!c->count) toggle_filled(p, at.bin);
    else if (c->count == 2 * half) { /* the upper half becomes a chunk of its own */
        Chunk *upper = insert_chunk(p, at.bin, at.chunk + 1);
        memcpy(upper->free, c->free + half, (size_t)half * sizeof(Free));
        upper->count = c->count = half;
        if (at.index > half) { c = upper; at.index -= half; }
    }
    if (c->count > at.index)
        memmove(c->free + at.index + 1, c->free + at.index, (size_t)(c->count - at.index) * sizeof(Free));
    c->count++;
    c->free[at.index] = f;
}

static inline void add(Allocator *a, int32_t block) {
    Block *b = &a->blocks[block];
    insert(&a->pools[b->pool], (Free){b->size, b->start, block});
    b->is_free = 1;
}

static inline void take(Allocator *a, int32_t block) {
    Block *b = &a->blocks[block];
    Pool *p = &a->pools[b->pool];
    delete_at(p, find(p, b->size, b->start));
    b->is_free = 0;
}

/* blocks; those out of use are chained by `after` */

static inline int32_t new_block(Allocator *a, Block content) {
    int32_t block = a->unused;
    if (block != NONE) a->unused = a->blocks[block].after;
    else {
        if (a->block_count == a->block_room)
            a->blocks = realloc(a->blocks, (size_t)(a->block_room = 2 * a->block_room + 256) * sizeof(Block));
        block = a->block_count++;
    }
    a->blocks[block] = content;
    return block;
}

static inline void recycle(Allocator *a, int32_t block) { a->blocks[block].after = a->unused; a->unused = block; }

static inline void link(Allocator *a, Pool *p, int32_t before, int32_t after) { /* a pool ends with its last block */
    a->blocks[before].after = after;
    if (after == NONE) p->last = before; else a->blocks[after].before = before;
}

/* the driver */

static int64_t page_size(const Pool *p) { return p->is_small ? 2 * MIB : 20 * MIB; }

static int refuses(Allocator *a, int64_t more) {
    int64_t reserved = a->reserved + more;
    if (a->capacity < 0 || reserved <= a->capacity) return 0;
    if (!a->refused || reserved < a->refused) a->refused = reserved;
    return 1;
}

static void unmap(Allocator *a, Pool *p) {
    int32_t block = p->last;
    if (block == NONE || !a->blocks[block].is_free) return;
    int64_t less = a->blocks[block].size / page_size(p) * page_size(p);
    if (!less) return;
    take(a, block);
    p->end -= less;
    a->reserved -= less;
    if (a->blocks[block].size -= less) { add(a, block); return; }
    p->last = a->blocks[block].before;
    if (p->last != NONE) a->blocks[p->last].after = NONE;
    recycle(a, block);
}

void release(Allocator *a) {
    for (int32_t n = 0; n < a->pool_count; n++) {
        Pool *p = &a->pools[n];
        if (a->expandable) { unmap(a, p); continue; }
        for (Bin *bin = p->bins; bin < p->bins + BINS; bin++)
            for (Place at = {bin, bin->count - 1, 0}; at.chunk >= 0; at.chunk--)
                for (at.index = bin->chunks[at.chunk]->count - 1; at.index >= 0; at.index--) {
                    int32_t block = bin->chunks[at.chunk]->free[at.index].block;
                    Block *b = &a->blocks[block];
                    if (b->before != NONE || b->after != NONE) continue;
                    a->reserved -= b->size;
                    recycle(a, block);
                    delete_at(p, at);
                }
    }
}

static void make_room(Allocator *a, int64_t more) { if (refuses(a, more)) release(a); }

static int request(Allocator *a, int64_t more) {
    make_room(a, more);
    if (refuses(a, more) || a->reserved > MOST - more) { a->missing = refuses(a, more) ? more : 0; return 0; }
    a->requests++;
    a->reserved += more;
    if (a->reserved > a->peak_reserved) a->peak_reserved = a->reserved;
    return 1;
}

static int32_t reserve(Allocator *a, int64_t size, int16_t pool) {
    Pool *p = &a->pools[pool];
    int64_t segment = p->is_small ? 2 * MIB : size < 10 * MIB ? 20 * MIB : (size + 2 * MIB - 1) / (2 * MIB) * (2 * MIB);
    if (!request(a, segment)) return FULL;
    p->end += segment;
    return new_block(a, (Block){p->end - segment, segment, NONE, NONE, pool, 0});
}

static int64_t missing(const Allocator *a, const Pool *p, int64_t size) {
    int64_t free = p->last != NONE && a->blocks[p->last].is_free ? a->blocks[p->last].size : 0, page = page_size(p);
    return (size - free + page - 1) / page * page;
}

static int32_t grow(Allocator *a, int64_t size, int16_t pool) {
    Pool *p = &a->pools[pool];
    make_room(a, missing(a, p, size));
    int64_t more = missing(a, p, size);
    if (!request(a, more)) return FULL;
    int32_t last = p->last, block = last;
    if (last != NONE && a->blocks[last].is_free) {
        take(a, last);
        a->blocks[last].size += more;
    } else {
        block = new_block(a, (Block){p->end, more, last, NONE, pool, 0});
        if (last != NONE) a->blocks[last].after = block;
    }
    p->last = block;
    p->end = a->blocks[block].start + a->blocks[block].size;
    return block;
}

/* allocating and freeing */

static inline int32_t allocate(Allocator *a, int64_t size, int32_t stream) {
    size = (size + 511) & -512;
    if (!size) return EMPTY;
    int is_small = size <= MIB;
    int16_t pool = (int16_t)(2 * stream + is_small);
    Pool *p = &a->pools[pool];
    Place at = find(p, size, 0);
    if (!at.bin->count || at.index == at.bin->chunks[at.chunk]->count) at = (Place){bin_after(p, at.bin), 0, 0};
    int32_t block;
    if (at.bin) {
        block = at.bin->chunks[at.chunk]->free[at.index].block;
        a->blocks[block].is_free = 0;
        delete_at(p, at);
    } else {
        block = a->expandable ? grow(a, size, pool) : reserve(a, size, pool);
        if (block == FULL) return FULL;
    }
    int64_t rest = a->blocks[block].size - size;
    if (rest > MIB || (rest && (is_small || a->expandable))) {
        Block b = a->blocks[block];
        int32_t other = new_block(a, (Block){b.start + size, rest, block, NONE, pool, 1});
        link(a, p, other, b.after);
        a->blocks[block].after = other;
        a->blocks[block].size = size;
        add(a, other);
    }
    a->allocated += a->blocks[block].size;
    if (a->allocated > a->peak_allocated) a->peak_allocated = a->allocated;
    return block;
}

static inline void deallocate(Allocator *a, int32_t block) {
    if (block == EMPTY) return;
    Block *b = &a->blocks[block];
    Pool *p = &a->pools[b->pool];
    a->allocated -= b->size;
    int32_t after = b->after, before = b->before;
    if (after != NONE && a->blocks[after].is_free) {
        take(a, after);
        b->size += a->blocks[after].size;
        link(a, p, block, a->blocks[after].after);
        recycle(a, after);
    }
    if (before != NONE && a->blocks[before].is_free) {
        take(a, before);
        a->blocks[before].size += b->size;
        link(a, p, before, b->after);
        recycle(a, block);
        block = before;
    }
    add(a, block);
}

int32_t alloc(Allocator *a, int64_t size, int32_t stream) { return allocate(a, size, stream); }

void free_block(Allocator *a, int32_t block) { deallocate(a, block); }

Allocator *allocator_new(int32_t expandable, int64_t capacity, int32_t streams) {
    Allocator *a = calloc(1, sizeof(Allocator));
    a->expandable = expandable;
    a->capacity = capacity;
    a->unused = NONE;
    a->pool_count = 2 * streams;
    a->pools = calloc((size_t)a->pool_count, sizeof(Pool));
    for (int32_t n = 0; n < a->pool_count; n++) { a->pools[n].is_small = n % 2; a->pools[n].last = NONE; }
    return a;
}

void allocator_delete(Allocator *a) {
    for (int32_t n = 0; n < a->pool_count; n++) {
        for (Chunk *c = a->pools[n].spare, *next; c; c = next) { next = c->spare; free(c); }
        for (Bin *bin = a->pools[n].bins; bin < a->pools[n].bins + BINS; bin++) {
            while (bin->count) free(bin->chunks[--bin->count]);
            free(bin->chunks);
        }
    }
    free(a->pools);
    free(a->blocks);
    free(a);
}

/* Replays `count` spans of events, see events.py. `sizes` and `streams` are indexed by key, `live` maps the numbers of
 * live storages to their blocks, all others to NONE. Returns the index of the event that did not fit, or that freed an
 * unknown storage: then `missing` is its number. Otherwise returns -1. */
int64_t replay(Allocator *a, int32_t *live, const int32_t *numbers, const int32_t *keys, const int64_t *spans,
               int64_t count, const int64_t *sizes, const int32_t *streams) {
    for (const int64_t *span = spans; span < spans + 4 * count; span += 4) {
        int64_t first = span[0], end = first + span[1], shift = span[2], requests = NONE;
        for (int64_t times = span[3]; times > 0 && requests != a->requests; times--) {
            requests = a->requests;
            for (int64_t i = first; i < end; i++) {
                int32_t key = keys[i], *block = &live[numbers[i] + shift];
                if (key == RELEASED) release(a);
                else if (key == FREED) {
                    a->missing = numbers[i] + shift;
                    if (*block == NONE) return i;
                    deallocate(a, *block);
                    *block = NONE;
                } else if (*block == NONE && (*block = allocate(a, sizes[key], streams[key])) == FULL) return i;
            }
        }
    }
    return NONE;
}

/* Finds in each of `count` groups of rows, of which group g ends before row ends[g], the first row with the largest sum
 * of its numbers times `values`: its index goes to best[g], NONE for a group without rows. See largest.py. */
void largest(const int64_t *rows, const int64_t *ends, int64_t count, const int64_t *values, int64_t width,
             int64_t *best) {
    int64_t row = 0;
    for (int64_t g = 0; g < count; g++) {
        int64_t most = 0;
        for (best[g] = NONE; row < ends[g]; row++, rows += width) {
            int64_t sum = 0;
            for (int64_t i = 0; i < width; i++) sum += rows[i] * values[i];
            if (best[g] == NONE || sum > most) { most = sum; best[g] = row; }
        }
    }
}
