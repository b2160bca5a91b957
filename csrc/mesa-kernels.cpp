#include "mesa-kernels.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

static std::atomic<bool> & is_on() {
    static std::atomic<bool> on([] {
        const char * wanted = getenv("MESA_KERNELS");
        return wanted == nullptr || strcmp(wanted, "stock") != 0;
    }());
    return on;
}

void mesa_kernels_set(bool on) {
    is_on() = on;
}

bool mesa_kernels_on(void) {
    return is_on();
}
