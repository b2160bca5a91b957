// mesa_gguf._core, in parts. Typed in mesa_gguf/_core.pyi.

#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace py = pybind11;

using i32_array  = py::array_t<int32_t>;
using i32_arg    = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using f32_arg    = py::array_t<float, py::array::c_style | py::array::forcecast>;
using breaks_arg = std::optional<py::array_t<uint8_t, py::array::c_style | py::array::forcecast>>;

// a NumPy array that owns the vector's memory: no copy
template <typename T>
py::array_t<T> to_array(std::vector<T> && values) {
    auto * v = new std::vector<T>(std::move(values));
    py::capsule owner(v, [](void * p) { delete (std::vector<T> *) p; });
    return py::array_t<T>(v->size(), v->data(), owner);
}

// null, or one value for each token
const uint8_t * breaks_data(const breaks_arg & breaks, int64_t n_tokens);

void load_backends(); // where they are files of their own

void bind_attention(py::module_ & m); // how long it takes
void bind_plan(py::module_ & m);      // plans, positions, masks
void bind_context(py::module_ & m);   // llama-mesa.h on a model or context
void bind_gguf(py::module_ & m);      // model files
void bind_sampling(py::module_ & m);  // the next token
void bind_watch(py::module_ & m);     // what ends a batch that is computed
