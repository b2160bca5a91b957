#include "mesa-kernels.h"

#include "ggml-impl.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

static std::atomic<bool> & is_on() {
    static std::atomic<bool> on([] {
        const char * wanted = getenv("MESA_KERNELS");
        const bool is_known = wanted == nullptr || *wanted == 0 || strcmp(wanted, "mesa") == 0;
        const bool is_stock = !is_known && strcmp(wanted, "stock") == 0;
        if (!is_known && !is_stock) {
            GGML_LOG_WARN(
                    "MESA_KERNELS is '%.20s' in the environment: neither stock nor mesa, so mesa's are used\n", wanted);
        }
        return !is_stock;
    }());
    return on;
}

void mesa_kernels_set(bool on) {
    is_on() = on;
}

bool mesa_kernels_on(void) {
    return is_on();
}
