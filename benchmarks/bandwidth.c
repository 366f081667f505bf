/* How fast this machine's cores read memory that is in no cache: the ceiling of everything that decodes.
 *
 * Each thread streams its own contiguous share of one buffer with the widest vectors the compiler knows, from several
 * places at once, because one stream alone leaves a core's outstanding reads unused. GCC/Clang vector extensions keep
 * this portable.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

typedef uint64_t vec __attribute__((vector_size(64)));

typedef struct {
  const vec *begin;
  size_t count;  /* vectors */
  int streams;   /* places read at once: 1, 2, 4 or 8 */
  uint64_t check;
  pthread_barrier_t *barrier;
} job;

static uint64_t fold(vec v) {
  uint64_t sum = 0;
  for (int i = 0; i < 8; ++i) sum ^= v[i];
  return sum;
}

static void read_share(job *j) {
  const size_t part = j->count / j->streams / 8 * 8;
  vec a = {0}, b = {0}, c = {0}, d = {0};
  for (size_t i = 0; i + 8 <= part; i += 8) {
    for (int s = 0; s < j->streams; ++s) {
      const vec *p = j->begin + s * part + i;
      __builtin_prefetch(p + 64);
      __builtin_prefetch(p + 66);
      __builtin_prefetch(p + 68);
      __builtin_prefetch(p + 70);
      a ^= p[0] ^ p[1];
      b ^= p[2] ^ p[3];
      c ^= p[4] ^ p[5];
      d ^= p[6] ^ p[7];
    }
  }
  j->check = fold(a ^ b ^ c ^ d);
}

static void *work(void *argument) {
  job *j = argument;
  pthread_barrier_wait(j->barrier);
  read_share(j);
  pthread_barrier_wait(j->barrier);
  return NULL;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

/* A buffer of `bytes` whose pages are all there; huge pages where `huge` and the system grants them. */
void *bandwidth_allocate(size_t bytes, int huge) {
  void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return NULL;
#ifdef MADV_HUGEPAGE
  madvise(p, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
  for (size_t i = 0; i < bytes / sizeof(uint64_t); ++i) ((uint64_t *)p)[i] = i * 0x9e3779b97f4a7c15u;
  return p;
}

void bandwidth_free(void *p, size_t bytes) { munmap(p, bytes); }

/* Read the buffer once with `threads` threads; returns seconds, and writes a value that depends on every byte. */
double bandwidth_read(const void *p, size_t bytes, int threads, int streams, uint64_t *check) {
  pthread_t *ids = calloc(threads, sizeof *ids);
  job *jobs = calloc(threads, sizeof *jobs);
  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, NULL, threads + 1);
  const size_t share = bytes / sizeof(vec) / threads;
  for (int t = 0; t < threads; ++t) {
    jobs[t] = (job){(const vec *)p + t * share, share, streams, 0, &barrier};
    pthread_create(&ids[t], NULL, work, &jobs[t]);
  }
  /* The clock is read before the last one lets the others go and after all are through. */
  const double began = now();
  pthread_barrier_wait(&barrier);
  pthread_barrier_wait(&barrier);
  const double took = now() - began;
  *check = 0;
  for (int t = 0; t < threads; ++t) {
    pthread_join(ids[t], NULL);
    *check ^= jobs[t].check;
  }
  pthread_barrier_destroy(&barrier);
  free(ids);
  free(jobs);
  return took;
}
