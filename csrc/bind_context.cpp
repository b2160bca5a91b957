// llama-mesa.h on models and contexts, which are given as the address of the C object.

#include "bind.h"
#include "convert.h"
#include "llama-mesa.h"
#include "plan.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

static llama_context * to_ctx(uintptr_t ctx) {
    if (ctx == 0) {
        throw std::invalid_argument("the context is closed");
    }
    return (llama_context *) ctx;
}

template <typename E, typename T>
static T check(T res) {
    if (res < 0) {
        throw E(llama_mesa_last_error());
    }
    return res;
}

static mesa::plan get_plan(llama_context * ctx) {
    mesa::plan pl;
    pl.chunk_starts.resize(check<std::runtime_error>(llama_mesa_get_plan(ctx, nullptr, 0, nullptr, nullptr)));
    llama_mesa_get_plan(ctx, pl.chunk_starts.data(), (int32_t) pl.chunk_starts.size(), &pl.anchor, &pl.stair_width);
    return pl;
}

// what a function of the C API gives as ranges: their number, and their ends one after the other
template <typename F>
static std::vector<std::pair<int32_t, int32_t>> ranges_of(F && get, uintptr_t ctx) {
    auto * c = to_ctx(ctx);
    std::vector<int32_t> ends(2 * check<std::runtime_error>(get(c, nullptr, 0)));
    get(c, ends.data(), (int32_t) ends.size() / 2);

    std::vector<std::pair<int32_t, int32_t>> res;
    for (size_t i = 0; i < ends.size(); i += 2) {
        res.emplace_back(ends[i], ends[i + 1]);
    }
    return res;
}

void bind_context(py::module_ & m) {
    m.attr("LLAMA_MESA_VERSION") = LLAMA_MESA_VERSION;

    m.def("default_params", [](uintptr_t model, int32_t train_length) {
        const auto c = llama_mesa_default_params((const llama_model *) model, train_length);
        if (c.train_length == 0) {
            throw std::invalid_argument(llama_mesa_last_error());
        }
        return mesa::from_c(c);
    }, py::arg("model"), py::arg("train_length") = 0);

    m.def("unsupported", [](uintptr_t model) -> std::optional<std::string> {
        const char * reason = llama_mesa_unsupported((const llama_model *) model);
        return reason ? std::optional<std::string>(reason) : std::nullopt;
    }, py::arg("model"));

    m.def("enable", [](uintptr_t ctx, const mesa::params & p) {
        const auto c = mesa::to_c(p);
        check<std::runtime_error>(llama_mesa_enable(to_ctx(ctx), &c));
    }, py::arg("ctx"), py::arg("params"));

    m.def("disable", [](uintptr_t ctx) { llama_mesa_disable(to_ctx(ctx)); }, py::arg("ctx"));
    m.def("enabled", [](uintptr_t ctx) { return llama_mesa_enabled(to_ctx(ctx)); }, py::arg("ctx"));

    m.def("prompt", [](uintptr_t ctx, int32_t n_tokens, const breaks_arg & breaks) {
        auto * c             = to_ctx(ctx);
        const uint8_t * data = nullptr;
        if (breaks) {
            const int32_t n_past = llama_memory_seq_pos_max(llama_get_memory(c), 0) + 1;
            data                 = breaks_data(breaks, (int64_t) n_past + n_tokens);
        }
        int32_t res;
        {
            py::gil_scoped_release release;
            res = llama_mesa_prompt(c, n_tokens, data);
        }
        return check<std::invalid_argument>(res);
    }, py::arg("ctx"), py::arg("n_tokens"), py::arg("breaks") = py::none());

    m.def("needs_breaks", [](uintptr_t ctx, int32_t n_tokens) {
        return check<std::runtime_error>(llama_mesa_needs_breaks(to_ctx(ctx), n_tokens)) != 0;
    }, py::arg("ctx"), py::arg("n_tokens"));

    m.def("n_batch", [](uintptr_t ctx, int32_t n_tokens, int32_t n_max) {
        return check<std::runtime_error>(llama_mesa_n_batch(to_ctx(ctx), n_tokens, n_max));
    }, py::arg("ctx"), py::arg("n_tokens"), py::arg("n_max"));

    m.def("set_plan", [](uintptr_t ctx, const mesa::plan & pl, int32_t n_tokens) -> std::optional<std::string> {
        const int32_t n   = (int32_t) pl.chunk_starts.size();
        const int32_t res = check<std::invalid_argument>(
                llama_mesa_set_plan(to_ctx(ctx), pl.chunk_starts.data(), n, pl.anchor, pl.stair_width, n_tokens));
        return res > 0 ? std::optional<std::string>(llama_mesa_last_error()) : std::nullopt;
    }, py::arg("ctx"), py::arg("plan"), py::arg("n_tokens"));

    m.def("plan", [](uintptr_t ctx) { return get_plan(to_ctx(ctx)); }, py::arg("ctx"));

    m.def("key_positions", [](uintptr_t ctx) {
        auto * c = to_ctx(ctx);
        std::vector<int32_t> res(check<std::runtime_error>(llama_mesa_get_key_pos(c, nullptr, 0)));
        llama_mesa_get_key_pos(c, res.data(), (int32_t) res.size());
        return to_array(std::move(res));
    }, py::arg("ctx"));

    m.def("chunk_size", [](uintptr_t ctx, int32_t n_tokens) {
        return check<std::invalid_argument>(llama_mesa_chunk_size(to_ctx(ctx), n_tokens));
    }, py::arg("ctx"), py::arg("n_tokens"));

    m.def("chunk_save", [](uintptr_t ctx, int32_t start, int32_t stop, const py::bytes & head) {
        auto * c = to_ctx(ctx);

        const std::string_view front = head;
        const int64_t size = check<std::invalid_argument>(llama_mesa_chunk_size(c, std::max(1, stop - start)));

        auto res =
                py::reinterpret_steal<py::bytes>(PyBytes_FromStringAndSize(nullptr, (Py_ssize_t) front.size() + size));
        if (!res) {
            throw py::error_already_set();
        }
        char * data = PyBytes_AS_STRING(res.ptr());
        std::copy(front.begin(), front.end(), data);

        int64_t n;
        {
            py::gil_scoped_release release;
            n = llama_mesa_chunk_save(c, start, stop, data + front.size(), size);
        }
        check<std::invalid_argument>(n);
        return res;
    }, py::arg("ctx"), py::arg("start"), py::arg("stop"), py::arg("head") = py::bytes());

    m.def("chunk_load", [](uintptr_t ctx, const i32_arg & tokens, const py::buffer & data) {
        auto * c = to_ctx(ctx);

        // not by py::buffer_info: it copies nothing either, but refuses formats that it does not know
        Py_buffer view;
        if (PyObject_GetBuffer(data.ptr(), &view, PyBUF_SIMPLE) != 0) {
            throw py::error_already_set();
        }
        int32_t res;
        {
            py::gil_scoped_release release;
            res = llama_mesa_chunk_load(c, tokens.data(), (int32_t) tokens.size(), view.buf, (size_t) view.len);
        }
        PyBuffer_Release(&view);
        if (res == LLAMA_MESA_CHUNK_UNFIT) {
            throw std::runtime_error(llama_mesa_last_error());
        }
        check<std::invalid_argument>(res);
    }, py::arg("ctx"), py::arg("tokens"), py::arg("data"));

    m.def("chunk_values_at", [](uintptr_t ctx, int32_t n_tokens, int32_t n_layers) {
        auto * c     = to_ctx(ctx);
        const auto n = check<std::invalid_argument>(llama_mesa_chunk_values_at(c, n_tokens, n_layers, nullptr));
        std::vector<std::pair<int64_t, int64_t>> res((size_t) n);
        std::vector<int64_t> ranges(2 * (size_t) n);
        check<std::invalid_argument>(llama_mesa_chunk_values_at(c, n_tokens, n_layers, ranges.data()));
        for (size_t i = 0; i < res.size(); ++i) {
            res[i] = { ranges[2 * i], ranges[2 * i + 1] };
        }
        return res;
    }, py::arg("ctx"), py::arg("n_tokens"), py::arg("n_layers"));

    m.def("chunk_values", [](uintptr_t ctx, const py::buffer & data, int32_t n_tokens, int32_t n_layers) {
        auto * c = to_ctx(ctx);

        Py_buffer view;
        if (PyObject_GetBuffer(data.ptr(), &view, PyBUF_SIMPLE) != 0) {
            throw py::error_already_set();
        }
        std::unique_ptr<Py_buffer, decltype(&PyBuffer_Release)> owner(&view, PyBuffer_Release);

        const auto size     = (size_t) view.len;
        const int64_t width = check<std::invalid_argument>(
                llama_mesa_chunk_values(c, view.buf, size, n_tokens, n_layers, nullptr, 0));

        py::array_t<float> res({ (py::ssize_t) n_tokens, (py::ssize_t) width });
        check<std::invalid_argument>(llama_mesa_chunk_values(
                c, view.buf, size, n_tokens, n_layers, res.mutable_data(), (size_t) res.size()));
        return res;
    }, py::arg("ctx"), py::arg("data"), py::arg("n_tokens"), py::arg("n_layers"));

    m.def("loaded_chunks", [](uintptr_t ctx) { return ranges_of(llama_mesa_get_loaded, ctx); }, py::arg("ctx"));

    m.def("attention_enable",
            [](uintptr_t ctx, const std::optional<std::vector<int32_t>> & layers, int32_t n, int32_t kind) {
        auto * c = to_ctx(ctx);
        check<std::invalid_argument>(llama_mesa_attention_enable(
                c, layers ? layers->data() : nullptr, layers ? (int32_t) layers->size() : n, kind));

        std::vector<int32_t> res(check<std::runtime_error>(llama_mesa_get_attention_layers(c, nullptr, 0)));
        llama_mesa_get_attention_layers(c, res.data(), (int32_t) res.size());
        return res;
    }, py::arg("ctx"), py::arg("layers"), py::arg("n"), py::arg("kind"));

    m.def("attention", [](uintptr_t ctx) {
        auto * c       = to_ctx(ctx);
        int32_t n_rows = 0;

        const int32_t n_layers = check<std::runtime_error>(llama_mesa_get_attention_layers(c, nullptr, 0));
        const int32_t n_keys   = check<std::runtime_error>(llama_mesa_get_attention(c, nullptr, 0, &n_rows));

        py::array_t<float> res({ n_layers, n_rows, n_keys });
        llama_mesa_get_attention(c, res.mutable_data(), res.size(), nullptr);
        return res;
    }, py::arg("ctx"));

    m.def("read_ranges", [](uintptr_t ctx) { return ranges_of(llama_mesa_get_read_ranges, ctx); }, py::arg("ctx"));

    m.def("set_read_ranges", [](uintptr_t ctx, const std::optional<std::vector<std::pair<int32_t, int32_t>>> & ranges) {
        std::vector<int32_t> flat;
        for (const auto & [from, to] : ranges.value_or(std::vector<std::pair<int32_t, int32_t>>())) {
            flat.push_back(from);
            flat.push_back(to);
        }
        flat.push_back(0); // no range is not NULL
        check<std::invalid_argument>(
                llama_mesa_set_read_ranges(to_ctx(ctx), ranges ? flat.data() : nullptr, (int32_t) (flat.size() / 2)));
    }, py::arg("ctx"), py::arg("ranges"));

    m.def("set_read_layers", [](uintptr_t ctx, const std::vector<int32_t> & layers) {
        check<std::invalid_argument>(llama_mesa_set_read_layers(to_ctx(ctx), layers.data(), (int32_t) layers.size()));
    }, py::arg("ctx"), py::arg("layers"));

    m.def("read_layers", [](uintptr_t ctx) {
        auto * c = to_ctx(ctx);
        std::vector<int32_t> res(check<std::runtime_error>(llama_mesa_get_read_layers(c, nullptr, 0)));
        llama_mesa_get_read_layers(c, res.data(), (int32_t) res.size());
        return res;
    }, py::arg("ctx"));

    m.attr("ATTENTION_MEAN")  = (int32_t) LLAMA_MESA_ATTENTION_MEAN;
    m.attr("ATTENTION_MAX")   = (int32_t) LLAMA_MESA_ATTENTION_MAX;
    m.attr("ATTENTION_HEADS") = (int32_t) LLAMA_MESA_ATTENTION_HEADS;

    m.def("clear_error", &llama_mesa_clear_error);
    m.def("last_error", []() { return std::string(llama_mesa_last_error()); });
}
