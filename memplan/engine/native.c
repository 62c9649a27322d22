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

typedef struct { int64_t start, size; int32_t before, after, lower, higher; int16_t pool; int16_t is_free; } Block;
enum { BINS = 512 };
typedef struct { int64_t end; int32_t last, is_small; uint64_t filled[BINS / 64]; int32_t bins[BINS]; } Pool;
typedef struct {
    /* read by native.py */
    int64_t allocated, reserved, peak_allocated, peak_reserved, requests, refused, capacity, missing;
    int32_t expandable, pool_count, block_count, block_room, unused;
    Pool *pools;
    Block *blocks;
} Allocator;

/* free blocks of a pool: in bins of similar sizes, eight to each power of two, of which most hold one. A bin is a tree,
 * searched by size, then start. The block with the highest rank is on top, in each part of it, too, which keeps it
 * shallow: mixtures of experts leave hundreds of thousands of one size */

static inline int bin_of(int64_t size) {
    uint64_t units = (uint64_t)size >> 6; /* sizes are multiples of 512 */
    int shift = 60 - __builtin_clzll(units);
    return 8 * shift + (int)(units >> shift) - 8;
}

static inline int is_less(const Block *f, const Block *g) {
    return f->size < g->size || (f->size == g->size && f->start < g->start);
}

static inline uint64_t rank(const Block *b) { return (uint64_t)b->start * 0x9e3779b97f4a7c15u; } /* as if at random */

static inline int32_t find(const Allocator *a, const Pool *p, int64_t size) { /* the smallest that holds it, or NONE */
    uint32_t n = (uint32_t)bin_of(size);
    int32_t found = NONE;
    for (int32_t block = p->bins[n]; block != NONE;) {
        const Block *b = &a->blocks[block];
        if (b->size >= size) { found = block; block = b->lower; } else block = b->higher;
    }
    for (n++; found == NONE && n < BINS; n = (n | 63) + 1) {
        uint64_t filled = p->filled[n / 64] >> n % 64;
        if (!filled) continue;
        found = p->bins[n + __builtin_ctzll(filled)];
        while (a->blocks[found].lower != NONE) found = a->blocks[found].lower;
    }
    return found;
}

static inline void add(Allocator *a, int32_t block) {
    Block *b = &a->blocks[block];
    Pool *p = &a->pools[b->pool];
    uint32_t n = (uint32_t)bin_of(b->size);
    int32_t *at = &p->bins[n], *lower = &b->lower, *higher = &b->higher;
    p->filled[n / 64] |= (uint64_t)1 << n % 64;
    while (*at != NONE && rank(&a->blocks[*at]) > rank(b))
        at = is_less(&a->blocks[*at], b) ? &a->blocks[*at].higher : &a->blocks[*at].lower;
    for (int32_t below = *at; below != NONE;) { /* divide what was there */
        Block *other = &a->blocks[below];
        if (is_less(other, b)) { *lower = below; lower = &other->higher; below = *lower; }
        else { *higher = below; higher = &other->lower; below = *higher; }
    }
    *lower = *higher = NONE;
    *at = block;
    b->is_free = 1;
}

static inline void take(Allocator *a, int32_t block) {
    Block *b = &a->blocks[block];
    Pool *p = &a->pools[b->pool];
    uint32_t n = (uint32_t)bin_of(b->size);
    int32_t *at = &p->bins[n], lower = b->lower, higher = b->higher;
    while (*at != block) at = is_less(&a->blocks[*at], b) ? &a->blocks[*at].higher : &a->blocks[*at].lower;
    while (lower != NONE && higher != NONE) { /* join what was below */
        Block *low = &a->blocks[lower], *high = &a->blocks[higher];
        if (rank(low) > rank(high)) { *at = lower; at = &low->higher; lower = *at; }
        else { *at = higher; at = &high->lower; higher = *at; }
    }
    *at = lower != NONE ? lower : higher;
    if (p->bins[n] == NONE) p->filled[n / 64] &= ~((uint64_t)1 << n % 64);
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
    for (int32_t n = 0; n < a->pool_count && a->expandable; n++) unmap(a, &a->pools[n]);
    for (int32_t block = 0; block < a->block_count && !a->expandable; block++) {
        Block *b = &a->blocks[block];
        if (!b->is_free || b->before != NONE || b->after != NONE) continue;
        a->reserved -= b->size;
        take(a, block);
        recycle(a, block);
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
    return new_block(a, (Block){p->end - segment, segment, NONE, NONE, NONE, NONE, pool, 0});
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
        block = new_block(a, (Block){p->end, more, last, NONE, NONE, NONE, pool, 0});
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
    int32_t block = find(a, p, size);
    if (block != NONE) take(a, block);
    else {
        block = a->expandable ? grow(a, size, pool) : reserve(a, size, pool);
        if (block == FULL) return FULL;
    }
    int64_t rest = a->blocks[block].size - size;
    if (rest > MIB || (rest && (is_small || a->expandable))) {
        Block b = a->blocks[block];
        int32_t other = new_block(a, (Block){b.start + size, rest, block, NONE, NONE, NONE, pool, 1});
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
    for (int32_t n = 0; n < a->pool_count; n++) {
        a->pools[n].is_small = n % 2;
        a->pools[n].last = NONE;
        memset(a->pools[n].bins, NONE, sizeof a->pools[n].bins);
    }
    return a;
}

void allocator_delete(Allocator *a) {
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
 * of its numbers times `values`: best[2 * g] is its index, NONE without rows, and the next its sum. See largest.py. */
void largest(const int64_t *rows, const int64_t *ends, int64_t count, const int64_t *values, int64_t width,
             int64_t *best) {
    int64_t row = 0;
    for (int64_t g = 0; g < count; g++, best += 2) {
        for (best[0] = NONE; row < ends[g]; row++, rows += width) {
            int64_t sum = 0;
            for (int64_t i = 0; i < width; i++) sum += rows[i] * values[i];
            if (best[0] == NONE || sum > best[1]) { best[0] = row; best[1] = sum; }
        }
    }
}
