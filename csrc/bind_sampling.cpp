// mesa_gguf._core.sample: llama.cpp's samplers on logits that Python has, with errors where llama_sampler_sample aborts.

#include "bind.h"

#include "llama.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

// no probability is left to others, and it is still a number when it is divided by a small temperature
static constexpr float largest = 1e30f;

using f32_array = py::array_t<float, py::array::c_style | py::array::forcecast>;

// logits: [n_vocab]. constraints: a chain that may forbid tokens, with -INFINITY (penalties, a grammar). selection: a chain that selects one
// of the others. Tokens further than reach below the best are left out: where their probability rounds to 0, llama.cpp's typical sampler
// gets NaN and sorts by it.
// note: as llama.cpp's C++ functions are called here and not through ctypes, what they throw arrives in Python as an exception
static llama_token sample(uintptr_t constraints, uintptr_t selection, const f32_array & logits, float reach) {
    if (constraints == 0 || selection == 0) {
        throw std::invalid_argument("the sampler is closed");
    }
    const auto * data  = logits.data();
    const auto n_vocab = (llama_token) logits.size();

    py::gil_scoped_release release;

    static thread_local std::vector<llama_token_data>
            candidates; // kept, as filling new memory takes longer than the rest
    candidates.resize(n_vocab);
    for (llama_token token = 0; token < n_vocab; ++token) {
        candidates[token] = { token, data[token], 0.0f };
    }
    llama_token_data_array cur = { candidates.data(), candidates.size(), /*.selected =*/-1, /*.sorted =*/false };
    llama_sampler_apply((llama_sampler *) constraints, &cur);

    bool numbers = true;
    float best   = -INFINITY;
    float worst  = INFINITY;
    for (size_t i = 0; i < cur.size; ++i) {
        auto & logit = cur.data[i].logit;
        numbers      = numbers && logit == logit;
        logit        = std::min(logit, largest);
        best         = std::max(best, logit);
        worst        = std::min(worst, logit);
    }
    if (!numbers) {
        throw std::runtime_error("the logits are not numbers");
    }
    if (best == -INFINITY) {
        throw std::runtime_error("no token of the vocabulary is left");
    }
    if (worst == -INFINITY || worst < best - reach) {
        const auto * end = std::remove_if(cur.data, cur.data + cur.size, [=](const llama_token_data & candidate) {
            return candidate.logit == -INFINITY || candidate.logit < best - reach;
        });
        cur.size         = end - cur.data;
    }

    llama_sampler_apply((llama_sampler *) selection, &cur);
    if (cur.selected < 0 || cur.selected >= (int64_t) cur.size) {
        throw std::runtime_error("no token was selected");
    }
    const auto token = cur.data[cur.selected].id;

    llama_sampler_accept((llama_sampler *) constraints, token);
    llama_sampler_accept((llama_sampler *) selection, token);
    return token;
}

void bind_sampling(py::module_ & m) {
    m.def("sample", &sample, py::arg("constraints"), py::arg("selection"), py::arg("logits"), py::arg("reach"));
}
