// Plans, positions and masks as NumPy arrays.

#include "bind.h"
#include "budget.h"
#include "mask.h"
#include "plan.h"

#include <optional>
#include <stdexcept>
#include <string>

const uint8_t * breaks_data(const breaks_arg & breaks, int64_t n_tokens) {
    if (!breaks) {
        return nullptr;
    }
    if (breaks->ndim() != 1 || breaks->size() != n_tokens) {
        throw std::invalid_argument(
                "breaks must have one value for each of the " + std::to_string(n_tokens) + " tokens");
    }
    return breaks->data();
}

static void check_range(int32_t start, int32_t stop) {
    if (start < 0 || stop < start) {
        throw std::invalid_argument("a range of tokens must have 0 <= start <= stop, not " + std::to_string(start) +
                                    " and " + std::to_string(stop));
    }
}

template <typename F>
static i32_array map_range(int32_t start, int32_t stop, F && f) {
    check_range(start, stop);
    std::vector<int32_t> res;
    {
        py::gil_scoped_release release;
        res.resize(stop - start);
        for (int32_t i = start; i < stop; ++i) {
            res[i - start] = f(i);
        }
    }
    return to_array(std::move(res));
}

static void check_n(int32_t n_tokens) {
    if (n_tokens < 1) {
        throw std::invalid_argument("a text of " + std::to_string(n_tokens) + " tokens cannot be planned");
    }
}

static mesa::plan make_checked(std::vector<int32_t> chunk_starts, int32_t anchor, int32_t stair_width) {
    mesa::plan pl;
    pl.chunk_starts = std::move(chunk_starts);
    pl.anchor       = anchor;
    pl.stair_width  = stair_width;

    // what the position functions rely on; whether it fits into T is validate's business
    if (pl.chunk_starts.empty() || pl.chunk_starts[0] != 0) {
        throw std::invalid_argument("chunk_starts must begin with 0");
    }
    for (size_t c = 1; c < pl.chunk_starts.size(); ++c) {
        if (pl.chunk_starts[c] <= pl.chunk_starts[c - 1]) {
            throw std::invalid_argument("chunk_starts must grow: " + std::to_string(pl.chunk_starts[c]) + " follows " +
                                        std::to_string(pl.chunk_starts[c - 1]));
        }
    }
    if (stair_width < 1) {
        throw std::invalid_argument("stair_width is " + std::to_string(stair_width) + ": it must be 1 or more");
    }
    if (anchor < 0) {
        throw std::invalid_argument("anchor is " + std::to_string(anchor) + ": it must be 0 or more");
    }
    return pl;
}

// the mask of a text, [query, key]
template <typename T>
static py::array_t<T> mask_rows(
        const mesa::params & p, const mesa::plan & pl, int32_t n_tokens, bool alibi, T (*cast)(float)) {
    check_n(n_tokens);
    py::array_t<T> res({ n_tokens, n_tokens });
    T * data = res.mutable_data();
    {
        py::gil_scoped_release release;
        const mesa::mask<T> mask(p, pl, alibi, cast);
        for (int64_t i = 0; i < n_tokens; ++i) {
            mask.row((int32_t) i, 0, n_tokens, data + i * n_tokens);
        }
    }
    return res;
}

static int32_t to_method(const std::string & name) {
    std::string known;
    for (int32_t method = 0; method < mesa::n_methods; ++method) {
        if (name == mesa::method_name(method)) {
            return method;
        }
        known += std::string(method > 0 ? ", " : "") + mesa::method_name(method);
    }
    throw std::invalid_argument("there is no method \"" + name + "\": use one of " + known);
}

void bind_plan(py::module_ & m) {
    py::list methods;
    for (int32_t method = 0; method < mesa::n_methods; ++method) {
        methods.append(mesa::method_name(method));
    }
    m.attr("METHODS") = py::tuple(methods);

    // classes like any other of Python's: pybind11's own metaclass is for static properties
    const py::metaclass plain((PyObject *) &PyType_Type);

    py::class_<mesa::params>(m, "Params", plain)
            .def(py::init([](int32_t train_length, int32_t first_chunk, int32_t chunk, int32_t last_chunk,
                                  int32_t stair_width, int32_t room, bool log_scaling, const std::string & method,
                                  int32_t window, int32_t n_sinks, float stair_bias, int32_t log_length,
                                  std::optional<int32_t> reading_length, int32_t read_budget, int32_t read_every) {
        mesa::params p;
        p.method         = to_method(method);
        p.window         = window;
        p.n_sinks        = n_sinks;
        p.stair_bias     = stair_bias;
        p.log_length     = log_length;
        p.train_length   = train_length;
        p.reading_length = reading_length.value_or(train_length);
        p.first_chunk    = first_chunk;
        p.chunk          = chunk;
        p.last_chunk     = last_chunk;
        p.stair_width    = stair_width;
        p.room           = room;
        p.log_scaling    = log_scaling;
        p.read_budget    = read_budget;
        p.read_every     = read_every;
        mesa::validate(p);
        return p;
    }),
                    py::kw_only(), py::arg("train_length"), py::arg("first_chunk"), py::arg("chunk"),
                    py::arg("last_chunk"), py::arg("stair_width") = 0, py::arg("room") = 0,
                    py::arg("log_scaling") = true, py::arg("method") = "mesa", py::arg("window") = 0,
                    py::arg("n_sinks") = 0, py::arg("stair_bias") = 0.0f, py::arg("log_length") = 0,
                    py::arg("reading_length") = py::none(), py::arg("read_budget") = 0,
                    py::arg("read_every") = mesa::params::read_every_default)
            .def_static("fill",
                    [](int32_t train_length, const std::string & method, std::optional<int32_t> first_chunk,
                            std::optional<int32_t> chunk, std::optional<int32_t> last_chunk,
                            std::optional<int32_t> stair_width, std::optional<int32_t> room,
                            std::optional<bool> log_scaling, std::optional<int32_t> window,
                            std::optional<int32_t> n_sinks, std::optional<float> stair_bias,
                            std::optional<int32_t> log_length, std::optional<int32_t> reading_length,
                            std::optional<int32_t> read_budget, std::optional<int32_t> read_every) {
        auto p           = mesa::params_unset(train_length, to_method(method));
        p.first_chunk    = first_chunk.value_or(mesa::unset);
        p.chunk          = chunk.value_or(mesa::unset);
        p.last_chunk     = last_chunk.value_or(mesa::unset);
        p.stair_width    = stair_width.value_or(mesa::unset);
        p.room           = room.value_or(mesa::unset);
        p.log_scaling    = log_scaling ? *log_scaling : mesa::unset;
        p.window         = window.value_or(mesa::unset);
        p.n_sinks        = n_sinks.value_or(mesa::unset);
        p.stair_bias     = stair_bias.value_or(mesa::unset);
        p.log_length     = log_length.value_or(mesa::unset);
        p.reading_length = reading_length.value_or(mesa::unset);
        p.read_budget    = read_budget.value_or(mesa::unset);
        p.read_every     = read_every.value_or(mesa::unset);
        p                = mesa::fill(p);
        mesa::validate(p);
        return p;
    },
                    py::kw_only(), py::arg("train_length"), py::arg("method") = "mesa",
                    py::arg("first_chunk") = py::none(), py::arg("chunk") = py::none(),
                    py::arg("last_chunk") = py::none(), py::arg("stair_width") = py::none(),
                    py::arg("room") = py::none(), py::arg("log_scaling") = py::none(), py::arg("window") = py::none(),
                    py::arg("n_sinks") = py::none(), py::arg("stair_bias") = py::none(),
                    py::arg("log_length") = py::none(), py::arg("reading_length") = py::none(),
                    py::arg("read_budget") = py::none(), py::arg("read_every") = py::none())
            .def_static("default",
                    [](int32_t train_length, const std::string & method) {
        return mesa::params_default(train_length, to_method(method));
    }, py::arg("train_length"), py::arg("method") = "mesa")
            .def_property_readonly("method", [](const mesa::params & p) { return mesa::method_name(p.method); })
            .def_readonly("window", &mesa::params::window)
            .def_readonly("n_sinks", &mesa::params::n_sinks)
            .def_readonly("stair_bias", &mesa::params::stair_bias)
            .def_readonly("read_budget", &mesa::params::read_budget)
            .def_property_readonly("read_every", &mesa::params::read_interval)
            .def_property_readonly("log_length", &mesa::params::n_unscaled)
            .def_property_readonly("chunked", &mesa::params::chunked)
            .def_readonly("train_length", &mesa::params::train_length)
            .def_readonly("reading_length", &mesa::params::reading_length)
            .def_readonly("first_chunk", &mesa::params::first_chunk)
            .def_readonly("chunk", &mesa::params::chunk)
            .def_readonly("last_chunk", &mesa::params::last_chunk)
            .def_readonly("stair_width", &mesa::params::stair_width)
            .def_readonly("room", &mesa::params::room)
            .def_property_readonly("log_scaling", [](const mesa::params & p) { return p.log_scaling != 0; });

    py::class_<mesa::plan>(m, "Plan", plain)
            .def(py::init(&make_checked), py::arg("chunk_starts"), py::arg("anchor"), py::arg("stair_width"))
            .def_property_readonly("chunk_starts",
                    [](py::object self) {
        auto & pl  = self.cast<mesa::plan &>();
        auto array = i32_array(pl.chunk_starts.size(), pl.chunk_starts.data(), self); // a view
        array.attr("setflags")(py::arg("write") = false);
        return array;
    })
            .def_readonly("anchor", &mesa::plan::anchor)
            .def_readonly("stair_width", &mesa::plan::stair_width)
            .def_property_readonly("last_start", &mesa::plan::last_start)
            .def("__eq__", [](const mesa::plan & a, const mesa::plan & b) { return a == b; })
            .def("__hash__",
                    [](const mesa::plan & pl) {
        return py::hash(py::make_tuple(py::cast(pl.chunk_starts).attr("__len__")(), pl.anchor, pl.stair_width));
    })
            .def("validate",
                    [](const mesa::plan & pl, const mesa::params & p, int32_t n_tokens) {
        mesa::validate(p, pl, n_tokens);
    }, py::arg("params"), py::arg("n_tokens") = 0)
            .def("n_positions", [](const mesa::plan & pl, int32_t n_tokens) { return mesa::n_pos(pl, n_tokens); },
                    py::arg("n_tokens"))
            .def("key_positions",
                    [](const mesa::plan & pl, int32_t start, int32_t stop) {
        return map_range(start, stop, [&](int32_t j) { return mesa::key_pos(pl, j); });
    }, py::arg("start"), py::arg("stop"))
            .def("query_positions",
                    [](const mesa::plan & pl, int32_t start, int32_t stop) {
        return map_range(start, stop, [&](int32_t i) { return mesa::query_pos(pl, i); });
    }, py::arg("start"), py::arg("stop"))
            .def("chunk_positions",
                    [](const mesa::plan & pl, int32_t start, int32_t stop) {
        return map_range(start, stop, [&](int32_t i) { return mesa::chunk_pos(pl, i); });
    }, py::arg("start"), py::arg("stop"))
            .def("mask", [](const mesa::plan & pl, int32_t n_tokens) {
        return mask_rows<bool>({}, pl, n_tokens, false, [](float v) { return v == 0.0f; });
    }, py::arg("n_tokens"));

    m.def("mask", [](const mesa::params & p, const mesa::plan & pl, int32_t n_tokens, bool alibi) {
        return mask_rows<float>(p, pl, n_tokens, alibi, [](float v) { return v; });
    }, py::arg("params"), py::arg("plan"), py::arg("n_tokens"), py::arg("alibi") = false);

    m.def("make_plan", [](const mesa::params & p, int32_t n_tokens, const breaks_arg & breaks) {
        check_n(n_tokens);
        const uint8_t * data = breaks_data(breaks, n_tokens);
        py::gil_scoped_release release;
        return mesa::make(p, n_tokens, data);
    }, py::arg("params"), py::arg("n_tokens"), py::arg("breaks") = py::none());

    m.def("extend_plan",
            [](const mesa::params & p, const mesa::plan & old, int32_t n_past, int32_t n_tokens,
                    const breaks_arg & breaks) {
        if (n_past < 0 || n_tokens <= n_past) {
            throw std::invalid_argument("n_tokens (" + std::to_string(n_tokens) + ") must be more than n_past (" +
                                        std::to_string(n_past) + ")");
        }
        const uint8_t * data = breaks_data(breaks, n_tokens);
        py::gil_scoped_release release;
        return mesa::extend(p, old, n_past, n_tokens, data);
    },
            py::arg("params"), py::arg("plan"), py::arg("n_past"), py::arg("n_tokens"), py::arg("breaks") = py::none());

    m.def("choose_ranges", [](const mesa::params & p, const mesa::plan & pl, const f32_arg & scores) {
        check_n((int32_t) scores.size());
        std::vector<std::pair<int32_t, int32_t>> res;
        std::vector<float> blocks;
        mesa::add_scores(p, pl, (int32_t) scores.size(), scores.data(), blocks);
        for (const auto & r : mesa::choose(p, pl, (int32_t) scores.size(), blocks)) {
            res.emplace_back(r.from, r.to);
        }
        return res;
    }, py::arg("params"), py::arg("plan"), py::arg("scores"));

    m.attr("READ_BLOCK") = (int32_t) mesa::read_block;

    m.def("log_scale", [](int32_t log_length, int32_t start, int32_t stop) {
        check_range(start, stop);
        if (log_length < 2) {
            throw std::invalid_argument("log_length must be 2 or more");
        }
        std::vector<float> res(stop - start);
        for (int32_t i = start; i < stop; ++i) {
            res[i - start] = mesa::log_scale(log_length, i);
        }
        return to_array(std::move(res));
    }, py::arg("log_length"), py::arg("start"), py::arg("stop"));
}
