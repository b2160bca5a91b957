#include "bind.h"

PYBIND11_MODULE(_core, m) {
    load_backends();

    m.doc() = "Plan, positions and masks of Mesa-Extrapolation, and the C API of llama-mesa.h.";

    bind_plan(m);
    bind_context(m);
    bind_gguf(m);
    bind_sampling(m);
    bind_attention(m);
    bind_watch(m);
}
