/* Preloaded into a process, makes one of its larger allocations fail, as where memory is short. */

#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>

void* __libc_malloc(size_t size);
void* __libc_memalign(size_t alignment, size_t size);

static atomic_size_t least;
static atomic_long until;
static atomic_long failed;

/* The `nth` allocation of at least `size` bytes from now on fails; none for 0. */
void fail_allocation(long nth, size_t size) {
  failed = 0;
  least = size;
  until = nth;
}

/* How many have failed since. */
long failed_allocations(void) { return failed; }

static int fails(size_t size) {
  if (until <= 0 || size < least || atomic_fetch_sub(&until, 1) != 1) return 0;
  ++failed;
  return 1;
}

void* malloc(size_t size) {
  if (!fails(size)) return __libc_malloc(size);
  errno = ENOMEM;
  return NULL;
}

void* memalign(size_t alignment, size_t size) {
  if (!fails(size)) return __libc_memalign(alignment, size);
  errno = ENOMEM;
  return NULL;
}

void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void** memory, size_t alignment, size_t size) {
  *memory = fails(size) ? NULL : __libc_memalign(alignment, size);
  return *memory ? 0 : ENOMEM;
}
