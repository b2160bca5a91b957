// mesa_gguf._core.Watch: signals, and what another thread wants, end a batch while llama_decode computes it.
//
// llama.cpp asks its abort callback after each operation of a graph, in the thread that called llama_decode. That thread has let go of the
// GIL, and takes it back for a moment a few times a second. The operations in between cost a look at a coarse clock.

#include "bind.h"

#include "llama.h"

#include <atomic>
#include <chrono>
#include <cmath>
#include <ctime>
#include <memory>
#include <stdexcept>
#include <thread>
#include <utility>

namespace {

int64_t now_ms() {
#ifdef CLOCK_MONOTONIC_COARSE
    timespec t;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
    return (int64_t) t.tv_sec * 1000 + t.tv_nsec / 1000000;
#else
    const auto t = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::milliseconds>(t).count();
#endif
}

// When Python ends, threads that still compute are ended too, and waited for: they would wait for a GIL that nobody gives, within llama.cpp,
// and compute with a model that is being freed.
std::atomic<bool> g_ends{ false };
std::atomic<int> g_n_running{ 0 };
std::thread::id g_last_thread; // computes on

void end() {
    g_last_thread = std::this_thread::get_id();
    g_ends        = true;

    py::gil_scoped_release release;
    for (int ms = 0; ms < 2000 && g_n_running > 0; ++ms) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

class watch {
public:
    watch(py::object ask, double seconds) : ask(std::move(ask)), interval_ms((int64_t) std::lround(1000 * seconds)) {}

    watch(const watch &) = delete;

    ~watch() { stop(); }

    void start() {
        if (running) {
            throw std::logic_error("a watch is entered once at a time");
        }
        raised.reset();
        ended   = false;
        n_asked = n_looked = 0;
        next_ms            = now_ms() + interval_ms;
        outer              = current;
        current            = this;
        running            = true;
        ++g_n_running;
    }

    void stop() {
        if (!running) {
            return;
        }
        if (current == this) { // and not left in another thread
            current = outer;
        }
        running = false;
        --g_n_running;
    }

    // what was raised meanwhile, if something was
    void leave() {
        stop();
        if (raised) {
            const auto err = std::move(raised);
            throw std::move(*err);
        }
        if (ended) {
            PyErr_SetNone(PyExc_SystemExit); // which ends a thread without a word
            throw py::error_already_set();
        }
    }

    // llama.cpp's abort callback; never throws
    static bool is_over(void * /* data */) {
        auto * w = current;
        return w && w->look();
    }

    int64_t n_asked  = 0; // by llama.cpp
    int64_t n_looked = 0; // with the GIL

private:
    bool look() {
        ++n_asked;
        if (raised || ended) {
            return true;
        }
        if (g_ends) {
            ended = std::this_thread::get_id() != g_last_thread;
            return ended;
        }
        if (now_ms() < next_ms) {
            return false;
        }
        ++n_looked;
        const PyGILState_STATE state = PyGILState_Ensure();
        try {
            if (PyErr_CheckSignals() != 0) { // in the main thread
                throw py::error_already_set();
            }
            if (!ask.is_none()) {
                ask();
            }
        } catch (py::error_already_set & err) {
            raised = std::make_unique<py::error_already_set>(std::move(err));
        }
        PyGILState_Release(state);
        next_ms = now_ms() + interval_ms;
        return raised != nullptr;
    }

    static thread_local watch * current;

    const py::object ask; // or None
    const int64_t interval_ms;
    int64_t next_ms = 0;

    watch * outer = nullptr; // of a decode that a signal's handler interrupts by another one
    bool running  = false;
    bool ended    = false; // Python ends

    std::unique_ptr<py::error_already_set> raised;
};

thread_local watch * watch::current = nullptr;

} // namespace

void bind_watch(py::module_ & m) {
    const py::metaclass plain((PyObject *) &PyType_Type); // as in bind_plan

    py::class_<watch>(m, "Watch", plain)
            .def(py::init<py::object, double>(), py::arg("ask"), py::arg("seconds"))
            .def("__enter__",
                    [](watch & w) -> watch & {
        w.start();
        return w;
    }, py::return_value_policy::reference)
            .def("__exit__", [](watch & w, const py::args &) { w.leave(); })
            .def_readonly("n_asked", &watch::n_asked)
            .def_readonly("n_looked", &watch::n_looked);

    m.def("let_watch", [](uintptr_t ctx) {
        if (ctx == 0) {
            throw std::invalid_argument("the context is closed");
        }
        llama_set_abort_callback((llama_context *) ctx, &watch::is_over, nullptr);
    }, py::arg("ctx"));

    py::module_::import("atexit").attr("register")(py::cpp_function(&end));
}
