#include "mesa-regex.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

namespace mesa {

static thread_local uint64_t n_steps_thread   = 0;
static thread_local uint64_t n_unknown_thread = 0;

static constexpr size_t none       = std::numeric_limits<size_t>::max();
static constexpr uint32_t char_max = std::numeric_limits<uint32_t>::max();

struct unknown_syntax {};

// --- sets of characters ------------------------------------------------------------------------------------------------

using char_range  = std::pair<uint32_t, uint32_t>; // both ends belong to it
using char_ranges = std::vector<char_range>;       // ascending, with gaps between them

static char_ranges tidy(char_ranges ranges) {
    std::sort(ranges.begin(), ranges.end());
    char_ranges out;
    for (const auto & range : ranges) {
        if (!out.empty() && (out.back().second == char_max || range.first <= out.back().second + 1)) {
            out.back().second = std::max(out.back().second, range.second);
        } else {
            out.push_back(range);
        }
    }
    return out;
}

static char_ranges complement(const char_ranges & ranges) {
    char_ranges out;
    uint32_t start = 0;
    for (const auto & range : ranges) {
        if (range.first > start) {
            out.emplace_back(start, range.first - 1);
        }
        if (range.second == char_max) {
            return out;
        }
        start = range.second + 1;
    }
    out.emplace_back(start, char_max);
    return out;
}

static char_ranges intersection(const char_ranges & a, const char_ranges & b) {
    char_ranges out = complement(a);
    for (const auto & range : complement(b)) {
        out.push_back(range);
    }
    return complement(tidy(out));
}

class char_set {
public:
    explicit char_set(const char_ranges & ranges) : ranges(ranges) {
        low.fill(false);
        for (const auto & range : ranges) {
            for (uint32_t c = range.first; c <= range.second && c < low.size(); ++c) {
                low[c] = true;
            }
        }
    }

    bool contains(uint32_t c) const { return c < low.size() ? low[c] : find(c); }

private:
    bool find(uint32_t c) const {
        const auto it = std::upper_bound(ranges.begin(), ranges.end(), char_range(c, char_max));
        return it != ranges.begin() && c <= std::prev(it)->second;
    }

    char_ranges ranges;
    std::array<bool, 256> low;
};

// --- the expression as a tree ------------------------------------------------------------------------------------------

struct node {
    enum node_type {
        type_chars,    // one character of `chars`
        type_sequence, // of parts, in order; empty: always matches
        type_choice,   // the first part that leads to a match
        type_repeat,   // the part, n_min to n_max times, rather more than fewer
        type_look,     // the part matches what follows (negated: does not); consumes nothing
        type_end,      // the end of the text
    };

    node_type type = type_sequence;
    char_ranges chars;
    std::vector<node> parts;
    size_t n_min = 0;
    size_t n_max = 0; // none: any number
    bool negated = false;
};

// matches without consuming anything, sometimes
static bool can_be_empty(const node & cur) {
    switch (cur.type) {
        case node::type_chars:    return false;
        case node::type_sequence: return std::all_of(cur.parts.begin(), cur.parts.end(), can_be_empty);
        case node::type_choice:   return std::any_of(cur.parts.begin(), cur.parts.end(), can_be_empty);
        case node::type_repeat:   return cur.n_min == 0;
        case node::type_look:     return true;
        case node::type_end:      return true;
    }
    return true;
}

// consumes something, sometimes
static bool can_consume(const node & cur) {
    return cur.type == node::type_chars ||
           (cur.type != node::type_look && std::any_of(cur.parts.begin(), cur.parts.end(), can_consume));
}

template <typename CharT>
static uint32_t code(CharT c) {
    return static_cast<uint32_t>(c);
}

template <>
uint32_t code(char c) {
    return static_cast<unsigned char>(c);
}

// ECMAScript, as far as the pre-tokenizers use it. Throws unknown_syntax for the rest.
template <typename CharT>
class parser {
public:
    explicit parser(const std::basic_string<CharT> & regex) : regex(regex) {}

    node parse() {
        node root = parse_choice(0);
        if (pos != regex.size()) {
            throw unknown_syntax();
        }
        // note: after an empty match std::regex looks for one that is not empty at the same place, which is not done here
        if (can_be_empty(root) && can_consume(root)) {
            throw unknown_syntax();
        }
        return root;
    }

private:
    static constexpr int max_depth    = 16;
    static constexpr size_t max_count = 1000;

    const std::basic_string<CharT> & regex;
    size_t pos = 0;

    bool at_end() const { return pos == regex.size(); }

    bool at(char c) const { return !at_end() && regex[pos] == CharT(c); }

    bool at_any(const char * chars) const {
        for (; *chars; ++chars) {
            if (at(*chars)) {
                return true;
            }
        }
        return false;
    }

    bool take(char c) {
        const bool found = at(c);
        pos += found;
        return found;
    }

    void expect(char c) {
        if (!take(c)) {
            throw unknown_syntax();
        }
    }

    uint32_t next_char() {
        if (at_end()) {
            throw unknown_syntax();
        }
        return code(regex[pos++]);
    }

    node parse_choice(int depth) {
        if (depth > max_depth) {
            throw unknown_syntax();
        }
        node choice;
        choice.type = node::type_choice;
        do {
            choice.parts.push_back(parse_sequence(depth));
        } while (take('|'));
        return choice.parts.size() == 1 ? std::move(choice.parts[0]) : choice;
    }

    node parse_sequence(int depth) {
        node sequence;
        auto & parts = sequence.parts;
        while (!at_end() && !at_any("|)")) {
            parts.push_back(parse_repeat(depth));

            // (?=[a])[b] is one character that is in both: a loop of these is then a loop over a set, which is the fast one
            const size_t n = parts.size();
            if (n > 1 && parts[n - 1].type == node::type_chars && parts[n - 2].type == node::type_look &&
                    !parts[n - 2].negated && parts[n - 2].parts[0].type == node::type_chars) {
                parts[n - 2] = chars(intersection(parts[n - 2].parts[0].chars, parts[n - 1].chars));
                parts.pop_back();
            }
        }
        return parts.size() == 1 ? std::move(parts[0]) : sequence;
    }

    node parse_repeat(int depth) {
        node part    = parse_atom(depth);
        size_t n_min = 1;
        size_t n_max = 1;
        if (take('*')) {
            n_min = 0;
            n_max = none;
        } else if (take('+')) {
            n_max = none;
        } else if (take('?')) {
            n_min = 0;
        } else if (take('{')) {
            n_min = n_max = parse_count();
            if (take(',')) {
                n_max = parse_count();
            }
            expect('}');
        } else {
            return part;
        }
        // note: lazy and possessive ones, loops over nothing
        if (at_any("*+?{") || n_max == 0 || n_min > n_max || can_be_empty(part)) {
            throw unknown_syntax();
        }
        node repeat;
        repeat.type  = node::type_repeat;
        repeat.n_min = n_min;
        repeat.n_max = n_max;
        repeat.parts.push_back(std::move(part));
        return repeat;
    }

    size_t parse_count() {
        size_t count = 0;
        if (!is_digit()) {
            throw unknown_syntax();
        }
        while (is_digit()) {
            count = 10 * count + (next_char() - '0');
            if (count > max_count) {
                throw unknown_syntax();
            }
        }
        return count;
    }

    bool is_digit() const { return !at_end() && code(regex[pos]) >= '0' && code(regex[pos]) <= '9'; }

    node parse_atom(int depth) {
        if (take('(')) {
            node group;
            if (!take('?')) {
                group = parse_choice(depth + 1); // note: nobody asks what a group has matched
            } else if (take(':')) {
                group = parse_choice(depth + 1);
            } else {
                group.type    = node::type_look;
                group.negated = at('!');
                if (!take('=') && !take('!')) {
                    throw unknown_syntax();
                }
                group.parts.push_back(parse_choice(depth + 1));
                if (can_be_empty(group.parts[0])) {
                    throw unknown_syntax();
                }
            }
            expect(')');
            return group;
        }
        if (take('[')) {
            return chars(parse_set());
        }
        if (take('$')) {
            node end;
            end.type = node::type_end;
            return end;
        }
        if (take('\\')) {
            return chars(parse_escape().first);
        }
        if (at_any("^.*+?{}]")) {
            throw unknown_syntax();
        }
        const uint32_t c = next_char();
        return chars({ { c, c } });
    }

    static node chars(char_ranges ranges) {
        node out;
        out.type  = node::type_chars;
        out.chars = std::move(ranges);
        return out;
    }

    // what follows a backslash; whether it is a single character
    std::pair<char_ranges, bool> parse_escape() {
        // as in the C locale. note: llama.cpp has replaced the white space of Unicode by \v
        static const char_ranges space = { { '\t', '\r' }, { ' ', ' ' } };
        static const char_ranges digit = { { '0', '9' } };

        uint32_t c = next_char();
        switch (c) {
            case 's': return { space, false };
            case 'S': return { complement(space), false };
            case 'd': return { digit, false };
            case 'D': return { complement(digit), false };
            case 'n': c = '\n'; break;
            case 'r': c = '\r'; break;
            case 't': c = '\t'; break;
            default:
                if (c >= 128 || c == '_' || (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') ||
                        (c >= 'a' && c <= 'z')) {
                    throw unknown_syntax();
                }
        }
        return { char_ranges{ { c, c } }, true };
    }

    char_ranges parse_set() {
        const bool negated = take('^');
        char_ranges ranges;
        if (at(']')) {
            throw unknown_syntax();
        }
        while (!take(']')) {
            const auto first = parse_set_item();
            if (!at('-')) {
                ranges.insert(ranges.end(), first.first.begin(), first.first.end());
                continue;
            }
            expect('-');
            const auto last = parse_set_item();
            // note: also a '-' at the end of the set, which nobody writes
            if (!first.second || !last.second || first.first[0].first > last.first[0].first) {
                throw unknown_syntax();
            }
            ranges.emplace_back(first.first[0].first, last.first[0].first);
        }
        ranges = tidy(ranges);
        return negated ? complement(ranges) : ranges;
    }

    std::pair<char_ranges, bool> parse_set_item() {
        if (at_any("-]")) {
            throw unknown_syntax();
        }
        if (take('\\')) {
            return parse_escape();
        }
        if (take('[')) {
            if (at_any(".:=")) { // [:alpha:] and the like
                throw unknown_syntax();
            }
            return { char_ranges{ { '[', '[' } }, true };
        }
        const uint32_t c = next_char();
        return { char_ranges{ { c, c } }, true };
    }
};

// --- the expression as a program ---------------------------------------------------------------------------------------

struct instruction {
    enum instruction_type : int32_t {
        type_chars, // `count` characters of a set
        type_star,  // characters of a set, as many as there are; or fewer, if what follows fails
        type_split, // what follows; or else alt
        type_loop,  // the same, where a loop begins and ends
        type_look,  // the program at alt matches (negated: does not) what follows
        type_end,   // the end of the piece
        type_match,
    };

    instruction_type type;
    int32_t set    = -1;
    int32_t count  = 0;
    int32_t next   = -1;
    int32_t alt    = -1;
    int32_t memory = -1; // of type_star and type_loop: what is known of them at each character
    bool negated   = false;
};

struct program {
    std::vector<instruction> code;
    std::vector<char_set> sets;
    int32_t start    = -1;
    int32_t n_memory = 0;
};

class compiler {
public:
    static program compile(const node & root) {
        compiler cur;
        cur.out.start = cur.emit(root, cur.add({ instruction::type_match }));
        return std::move(cur.out);
    }

private:
    static constexpr size_t max_code = 10000;

    program out;
    std::vector<char_ranges> sets; // of out.sets

    int32_t add(instruction cur) {
        if (out.code.size() >= max_code) {
            throw unknown_syntax();
        }
        if (cur.type == instruction::type_star || cur.type == instruction::type_loop) {
            cur.memory = out.n_memory++;
        }
        out.code.push_back(cur);
        return int32_t(out.code.size()) - 1;
    }

    int32_t add_chars(instruction::instruction_type type, const node & cur, int32_t count, int32_t next) {
        const auto known = std::find(sets.begin(), sets.end(), cur.chars);
        instruction chars{ type };
        chars.set   = int32_t(known - sets.begin());
        chars.count = count;
        chars.next  = next;
        if (known == sets.end()) {
            sets.push_back(cur.chars);
            out.sets.emplace_back(cur.chars);
        }
        return add(chars);
    }

    int32_t add_split(instruction::instruction_type type, int32_t next, int32_t alt) {
        instruction split{ type };
        split.next = next;
        split.alt  = alt;
        return add(split);
    }

    // -> where the program of this node begins; it goes on at next
    int32_t emit(const node & cur, int32_t next) {
        switch (cur.type) {
            case node::type_chars: return add_chars(instruction::type_chars, cur, 1, next);
            case node::type_sequence:
                for (auto it = cur.parts.rbegin(); it != cur.parts.rend(); ++it) {
                    next = emit(*it, next);
                }
                return next;
            case node::type_choice: {
                int32_t start = emit(cur.parts.back(), next);
                for (auto it = std::next(cur.parts.rbegin()); it != cur.parts.rend(); ++it) {
                    start = add_split(instruction::type_split, emit(*it, next), start);
                }
                return start;
            }
            case node::type_repeat: return emit_repeat(cur, next);
            case node::type_look:   {
                instruction look{ instruction::type_look };
                look.alt     = emit(cur.parts[0], add({ instruction::type_match }));
                look.next    = next;
                look.negated = cur.negated;
                return add(look);
            }
            case node::type_end: {
                instruction end{ instruction::type_end };
                end.next = next;
                return add(end);
            }
        }
        return next;
    }

    int32_t emit_repeat(const node & cur, int32_t next) {
        const node & part = cur.parts[0];
        const bool set    = part.type == node::type_chars;
        if (cur.n_max != none) {
            // a{1,3} is a(a(a)?)?
            const int32_t after = next;
            for (size_t i = cur.n_min; i < cur.n_max; ++i) {
                next = add_split(instruction::type_split, emit(part, next), after);
            }
        } else if (set) {
            next = add_chars(instruction::type_star, part, 0, next);
        } else {
            const int32_t loop  = add_split(instruction::type_loop, -1, next);
            const int32_t body  = emit(part, loop);
            out.code[loop].next = body;
            next                = loop;
        }
        if (set && cur.n_min > 0) {
            return add_chars(instruction::type_chars, part, int32_t(cur.n_min), next);
        }
        for (size_t i = 0; i < cur.n_min; ++i) {
            next = emit(part, next);
        }
        return next;
    }
};

// --- matching ----------------------------------------------------------------------------------------------------------

// A backtracker as std::regex is, with its stack on the heap, and with a memory: whether a loop at a character leads to a match
// depends on nothing else, so that it is tried once in a piece, whatever match it is tried for.
template <typename CharT>
class matcher {
public:
    matcher(const program & prog, const std::basic_string<CharT> & text, size_t n_pieces) :
            prog(prog), text(text), n_slots(text.size() + n_pieces), failed(prog.n_memory), matched(prog.n_memory) {}

    ~matcher() { n_steps_thread += n_steps; }

    // the text from begin to end, in ascending order and without gaps
    void split(size_t begin, size_t end, std::vector<size_t> & lengths) {
        this->end   = end;
        size_t last = begin; // the end of the last match
        for (size_t start = begin; start <= end;) {
            const size_t stop = run(prog.start, start);
            if (stop == none) {
                ++start;
                continue;
            }
            if (start > last) {
                lengths.push_back(start - last);
            }
            lengths.push_back(stop - start);
            last  = stop;
            start = std::max(stop, start + 1);
        }
        if (last < end) {
            lengths.push_back(end - last);
        }
        ++piece;
    }

private:
    // what to do when what comes after fails
    struct frame {
        enum frame_type {
            type_go,   // go on at pc
            type_star, // a character fewer
            type_loop, // nothing more
        };

        frame_type type = type_go;
        int32_t pc      = -1;
        size_t pos      = 0;
        size_t first    = 0; // of a star: the places at which it may end; pos is the one that is tried
        size_t last     = 0;
    };

    using slots = std::vector<bool>;

    const program & prog;
    const std::basic_string<CharT> & text;
    const size_t n_slots;

    size_t end       = 0;
    size_t piece     = 0;
    uint64_t n_steps = 0;

    std::vector<frame> stack;
    std::vector<slots> failed;  // [n_memory][n_slots, or 0 while nothing is known]
    std::vector<slots> matched; // the same, for (?=) and (?!)

    size_t slot(size_t pos) const {
        return pos + piece; // note: a piece ends where the next one begins
    }

    bool known(const std::vector<slots> & memory, const instruction & cur, size_t pos) const {
        const slots & of_cur = memory[cur.memory];
        return !of_cur.empty() && of_cur[slot(pos)];
    }

    void remember(std::vector<slots> & memory, const instruction & cur, size_t first, size_t last) {
        slots & of_cur = memory[cur.memory];
        if (of_cur.empty()) {
            of_cur.resize(n_slots);
        }
        for (size_t pos = first; pos <= last; ++pos) {
            of_cur[slot(pos)] = true;
        }
        n_steps += last - first + 1;
    }

    bool in_set(const instruction & cur, size_t pos) const {
        return pos < end && prog.sets[cur.set].contains(code(text[pos]));
    }

    // -> the end of the match that begins at pos, or none. `look`: of (?=) and (?!), for which it calls itself; a match of the
    // main program need not be remembered, since what comes next begins behind it.
    size_t run(int32_t pc, size_t pos, bool look = false) {
        const size_t base = stack.size();
        for (;;) {
            const instruction & cur = prog.code[pc];
            bool ok                 = true;
            bool done               = false;
            ++n_steps;

            switch (cur.type) {
                case instruction::type_chars:
                    for (int32_t i = 0; i < cur.count && (ok = in_set(cur, pos)); ++i) {
                        ++pos;
                        ++n_steps;
                    }
                    break;
                case instruction::type_star: {
                    ok   = !known(failed, cur, pos);
                    done = look && known(matched, cur, pos);
                    if (!ok || done) {
                        break;
                    }
                    const size_t first = pos;
                    // where the star has failed already it need not end, nor further on
                    while (!done && in_set(cur, pos) && !known(failed, cur, pos + 1)) {
                        ++pos;
                        ++n_steps;
                        done = look && known(matched, cur, pos);
                    }
                    if (pos > first) {
                        stack.push_back({ frame::type_star, pc, pos, first, pos });
                    }
                    break;
                }
                case instruction::type_loop:
                    ok   = !known(failed, cur, pos);
                    done = look && known(matched, cur, pos);
                    if (!ok || done) {
                        break;
                    }
                    stack.push_back({ frame::type_loop, pc, pos, pos, pos });
                    stack.push_back({ frame::type_go, cur.alt, pos, pos, pos });
                    break;
                case instruction::type_split: stack.push_back({ frame::type_go, cur.alt, pos, pos, pos }); break;
                case instruction::type_look:  ok = (run(cur.alt, pos, true) != none) != cur.negated; break;
                case instruction::type_end:   ok = pos == end; break;
                case instruction::type_match: done = true; break;
            }

            if (done) {
                if (look) {
                    remember_match(base);
                }
                stack.resize(base);
                return pos;
            }
            if (ok) {
                pc = cur.next;
            } else if (!go_back(base, pc, pos)) {
                return none;
            }
        }
    }

    // what is still on the stack lies on the way to the match
    void remember_match(size_t base) {
        for (size_t i = base; i < stack.size(); ++i) {
            const frame & top = stack[i];
            if (top.type != frame::type_go) {
                remember(matched, prog.code[top.pc], top.first, top.pos);
            }
        }
    }

    bool go_back(size_t base, int32_t & pc, size_t & pos) {
        while (stack.size() > base) {
            frame & top = stack.back();
            ++n_steps;
            if (top.type == frame::type_star && top.pos > top.first) {
                pos = --top.pos;
                pc  = prog.code[top.pc].next;
                return true;
            }
            if (top.type == frame::type_go) {
                pos = top.pos;
                pc  = top.pc;
                stack.pop_back();
                return true;
            }
            remember(failed, prog.code[top.pc], top.first, top.last);
            stack.pop_back();
        }
        return false;
    }
};

template <typename CharT>
static std::optional<std::vector<size_t>> split(const std::basic_string<CharT> & text,
        const std::basic_string<CharT> & regex, const std::vector<size_t> & lengths) {
    program prog;
    try {
        prog = compiler::compile(parser<CharT>(regex).parse());
    } catch (const unknown_syntax &) {
        ++n_unknown_thread;
        return std::nullopt;
    }

    std::vector<size_t> out;
    out.reserve(lengths.size());
    matcher<CharT> cur(prog, text, lengths.size());
    size_t begin = 0;
    for (const size_t length : lengths) {
        cur.split(begin, begin + length, out);
        begin += length;
    }
    return out;
}

std::optional<std::vector<size_t>> regex_split(
        const std::string & text, const std::string & regex, const std::vector<size_t> & lengths) {
    return split(text, regex, lengths);
}

std::optional<std::vector<size_t>> regex_split(
        const std::wstring & text, const std::wstring & regex, const std::vector<size_t> & lengths) {
    return split(text, regex, lengths);
}

} // namespace mesa

void llama_mesa_regex_counts(uint64_t * n_steps, uint64_t * n_unknown) {
    *n_steps   = mesa::n_steps_thread;
    *n_unknown = mesa::n_unknown_thread;
}
