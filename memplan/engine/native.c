/* The model of torch's caching allocator in C: the decisions of allocator.py, whose docstrings explain them, for
 * replays of millions of events. tests/engine/test_native.py holds both to each other.
 *
 * replay() is the entry point of complete runs, largest() compares moments (largest.py). A storage that did not fit has
 * no block, an empty one has EMPTY.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { FREED = -1, RELEASED = -2, NONE = -1, BINS = 512, CHUNK = 255 };
static const int64_t MIB = 1 << 20, MOST = (int64_t)1 << 61; /* bytes reserved that are still counted exactly */

typedef struct Block Block;
typedef struct Pool {
    int64_t end;
    Block *last, *bins[BINS];
    uint64_t filled[BINS / 64];
    int32_t is_small;
} Pool;
struct Block { int64_t start, size; Block *before, *after, *lower, *higher; Pool *pool; int32_t is_free; uint32_t bin; };
static Block EMPTY;
typedef struct Chunk { struct Chunk *next; Block blocks[CHUNK]; } Chunk;
typedef struct {
    /* read by native.py */
    int64_t allocated, reserved, peak_allocated, peak_reserved, requests, refused, capacity, missing;
    int32_t expandable, pool_count, new_blocks; /* the latter are the first ones of the first chunk */
    Block *unused;
    Chunk *chunks;
    Pool *pools;
} Allocator;

/* free blocks of a pool: in bins of similar sizes, eight to each power of two, of which most hold one. A bin is a tree,
 * searched by size, then start. The block with the highest rank is on top, in each part of it, too, which keeps it
 * shallow: mixtures of experts leave hundreds of thousands of one size */

static inline uint32_t bin_of(int64_t size) {
    uint64_t units = (uint64_t)size >> 6; /* sizes are multiples of 512 */
    int shift = 60 - __builtin_clzll(units);
    return 8 * (uint32_t)shift + (uint32_t)(units >> shift) - 8;
}

static inline int is_less(const Block *f, const Block *g) {
    return f->size < g->size || (f->size == g->size && f->start < g->start);
}

static inline uint64_t rank(const Block *b) { return (uint64_t)b->start * 0x9e3779b97f4a7c15u; } /* as if at random */

static inline Block *find(const Pool *p, int64_t size) { /* the smallest that holds it, or NULL */
    uint32_t n = bin_of(size);
    Block *found = NULL;
    for (Block *b = p->bins[n]; b;) {
        if (b->size >= size) { found = b; b = b->lower; } else b = b->higher;
    }
    for (n++; !found && n < BINS; n = (n | 63) + 1) {
        uint64_t filled = p->filled[n / 64] >> n % 64;
        if (!filled) continue;
        found = p->bins[n + (uint32_t)__builtin_ctzll(filled)];
        while (found->lower) found = found->lower;
    }
    return found;
}

static inline void add(Block *b) {
    Pool *p = b->pool;
    uint32_t n = bin_of(b->size);
    Block **at = &p->bins[n], **lower = &b->lower, **higher = &b->higher;
    p->filled[n / 64] |= (uint64_t)1 << n % 64;
    while (*at && rank(*at) > rank(b)) at = is_less(*at, b) ? &(*at)->higher : &(*at)->lower;
    for (Block *below = *at; below;) { /* divide what was there */
        if (is_less(below, b)) { *lower = below; lower = &below->higher; below = *lower; }
        else { *higher = below; higher = &below->lower; below = *higher; }
    }
    *lower = *higher = NULL;
    *at = b;
    b->bin = n;
    b->is_free = 1;
}

static inline void take(Block *b) {
    Pool *p = b->pool;
    uint32_t n = b->bin;
    Block **at = &p->bins[n], *lower = b->lower, *higher = b->higher;
    while (*at != b) at = is_less(*at, b) ? &(*at)->higher : &(*at)->lower;
    while (lower && higher) { /* join what was below */
        if (rank(lower) > rank(higher)) { *at = lower; at = &lower->higher; lower = *at; }
        else { *at = higher; at = &higher->lower; higher = *at; }
    }
    *at = lower ? lower : higher;
    if (!p->bins[n]) p->filled[n / 64] &= ~((uint64_t)1 << n % 64);
    b->is_free = 0;
}

/* blocks come from chunks, which stay where they are; those out of use are chained by `after` */

static inline Block *new_block(Allocator *a, Pool *pool, int64_t start, int64_t size, Block *before) {
    Block *b = a->unused;
    if (b) a->unused = b->after;
    else {
        if (!a->new_blocks) {
            Chunk *chunk = malloc(sizeof(Chunk));
            chunk->next = a->chunks;
            a->chunks = chunk;
            a->new_blocks = CHUNK;
        }
        b = &a->chunks->blocks[--a->new_blocks];
    }
    b->start = start, b->size = size, b->before = before, b->after = NULL, b->pool = pool, b->is_free = 0;
    return b;
}

static inline void recycle(Allocator *a, Block *b) { b->after = a->unused; a->unused = b; }

static inline void link(Block *before, Block *after) { /* a pool ends with its last block */
    before->after = after;
    if (after) after->before = before; else before->pool->last = before;
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
    Block *b = p->last;
    if (!b || !b->is_free) return;
    int64_t less = b->size / page_size(p) * page_size(p);
    if (!less) return;
    take(b);
    p->end -= less;
    a->reserved -= less;
    if (b->size -= less) { add(b); return; }
    p->last = b->before;
    if (p->last) p->last->after = NULL;
    recycle(a, b);
}

void release(Allocator *a) {
    for (int32_t n = 0; n < a->pool_count && a->expandable; n++) unmap(a, &a->pools[n]);
    int32_t first = a->new_blocks;
    for (Chunk *chunk = a->expandable ? NULL : a->chunks; chunk; chunk = chunk->next, first = 0)
        for (Block *b = chunk->blocks + first; b < chunk->blocks + CHUNK; b++) {
            if (!b->is_free || b->before || b->after) continue;
            a->reserved -= b->size;
            take(b);
            recycle(a, b);
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

static Block *reserve(Allocator *a, Pool *p, int64_t size) {
    int64_t segment = p->is_small ? 2 * MIB : size < 10 * MIB ? 20 * MIB : (size + 2 * MIB - 1) / (2 * MIB) * (2 * MIB);
    if (!request(a, segment)) return NULL;
    p->end += segment;
    return new_block(a, p, p->end - segment, segment, NULL);
}

static int64_t missing(const Pool *p, int64_t size) {
    int64_t free = p->last && p->last->is_free ? p->last->size : 0, page = page_size(p);
    return (size - free + page - 1) / page * page;
}

static Block *grow(Allocator *a, Pool *p, int64_t size) {
    make_room(a, missing(p, size));
    int64_t more = missing(p, size);
    if (!request(a, more)) return NULL;
    Block *last = p->last, *b = last;
    if (last && last->is_free) {
        take(last);
        last->size += more;
    } else {
        b = new_block(a, p, p->end, more, last);
        if (last) last->after = b;
    }
    p->last = b;
    p->end = b->start + b->size;
    return b;
}

/* allocating and freeing */

static inline Block *allocate(Allocator *a, int64_t size, int32_t stream) {
    size = (size + 511) & -512;
    if (!size) return &EMPTY;
    int is_small = size <= MIB;
    Pool *p = &a->pools[2 * stream + is_small];
    Block *b = find(p, size);
    if (b) take(b);
    else if (!(b = a->expandable ? grow(a, p, size) : reserve(a, p, size))) return NULL;
    int64_t rest = b->size - size;
    if (rest > MIB || (rest && (is_small || a->expandable))) {
        Block *other = new_block(a, p, b->start + size, rest, b);
        link(other, b->after);
        b->after = other;
        b->size = size;
        add(other);
    }
    a->allocated += b->size;
    if (a->allocated > a->peak_allocated) a->peak_allocated = a->allocated;
    return b;
}

static inline void deallocate(Allocator *a, Block *b) {
    if (b == &EMPTY) return;
    Block *before = b->before, *after = b->after;
    a->allocated -= b->size;
    if (after && after->is_free) {
        take(after);
        b->size += after->size;
        link(b, after->after);
        recycle(a, after);
    }
    if (before && before->is_free) {
        take(before);
        before->size += b->size;
        link(before, b->after);
        recycle(a, b);
        b = before;
    }
    add(b);
}

Block *alloc(Allocator *a, int64_t size, int32_t stream) { return allocate(a, size, stream); }

void free_block(Allocator *a, Block *b) { deallocate(a, b); }

Allocator *allocator_new(int32_t expandable, int64_t capacity, int32_t streams) {
    Allocator *a = calloc(1, sizeof(Allocator));
    a->expandable = expandable;
    a->capacity = capacity;
    a->pool_count = 2 * streams;
    a->pools = calloc((size_t)a->pool_count, sizeof(Pool));
    for (int32_t n = 0; n < a->pool_count; n++) a->pools[n].is_small = n % 2;
    return a;
}

void allocator_delete(Allocator *a) {
    for (Chunk *chunk = a->chunks, *next; chunk; chunk = next) {
        next = chunk->next;
        free(chunk);
    }
    free(a->pools);
    free(a);
}

/* Replays `count` spans of events, see events.py. `sizes` and `streams` are indexed by key, `live` maps the numbers of
 * live storages to the addresses of their blocks, all others to 0. Returns the index of the event that did not fit, or
 * that freed an unknown storage: then `missing` is its number. Otherwise returns -1. */
int64_t replay(Allocator *a, int64_t *live, const int32_t *numbers, const int32_t *keys, const int64_t *spans,
               int64_t count, const int64_t *sizes, const int32_t *streams) {
    for (const int64_t *span = spans; span < spans + 4 * count; span += 4) {
        int64_t first = span[0], end = first + span[1], shift = span[2], requests = NONE;
        for (int64_t times = span[3]; times > 0 && requests != a->requests; times--) {
            requests = a->requests;
            for (int64_t i = first; i < end; i++) {
                int32_t key = keys[i];
                int64_t *block = &live[numbers[i] + shift];
                if (key == RELEASED) release(a);
                else if (key == FREED) {
                    a->missing = numbers[i] + shift;
                    if (!*block) return i;
                    deallocate(a, (Block *)(intptr_t)*block);
                    *block = 0;
                } else if (!*block && !(*block = (intptr_t)allocate(a, sizes[key], streams[key]))) return i;
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
