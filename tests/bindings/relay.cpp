// Stands in for libnvinfer, libnvonnxparser and libnvinfer_plugin, so that NVIDIA's own Python bindings of TensorRT load
// and run where those libraries cannot be had. It knows no method of TensorRT: to it a call is the name of a class and the
// number of the virtual function that the bindings of a release were compiled to call.
//
//     RELAY=record    gives out objects that note each call and answer as they were told
//     RELAY=<file>    gives out objects that pass each call on to an object of TensorRT-RTX, to the function that the file
//                     names for it, in lines of `class function function-of-RTX class-of-result from:to,...`: what the
//                     numbers of an enumeration mean changed, so the first argument is translated
//
// RELAY_LOGGER is set for the bindings of TensorRT 10, whose loggers are called in another way than TensorRT-RTX does.
//
// An object of TensorRT begins with a pointer to its virtual functions, of which there are only destructors, and a pointer
// to its implementation, which has virtual functions of its own. Those of the parser's classes are on the object itself.
// A Thing is object and implementation at once. Its functions take six words, as the System V ABI passes integers and
// addresses; floating point, and structures passed by value, do not get through.

#include <dlfcn.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <typeinfo>
#include <utility>
#include <vector>

namespace {

using Word = std::uintptr_t;
using Arguments = std::array<Word, 6>;
using Function = Word (*)(Word, Word, Word, Word, Word, Word);
using Key = std::pair<std::string, int>;  // class, number of a function

constexpr int FUNCTIONS = 256;   // more than any class has
constexpr int DESTRUCTORS = 2;   // the first two of an object
std::set<std::string> const DIRECT{"OnnxParser", "ParserError", "OnnxParserRefitter"};
constexpr char const* INFER = "libtensorrt_rtx.so.1";
constexpr char const* PARSER = "libtensorrt_onnxparser_rtx.so.1";

struct Thing {
    void** functions;
    Thing* implementation;
    std::string kind;
    Word real;  // the object of TensorRT-RTX
};

struct Call {
    std::string kind;
    int function;
    Arguments arguments;
};

struct Answer {
    std::string kind;  // the class of the object to return, or "" for `value` itself
    Word value;
    std::vector<std::int64_t> dims;  // where a structure is to be returned: Dims
};

struct Route {
    int function;
    std::string result;  // the class of the object that comes back, "-" where none does
    std::map<Word, Word> numbers;  // what the first argument becomes
};

std::set<Word> things;
std::map<std::pair<std::string, Word>, Word> wrapped;  // class and object of TensorRT-RTX -> its Thing
std::vector<Call> calls;
std::map<Key, std::vector<Answer>> answers;
std::map<Key, std::size_t> turns;
Word unknown = 0;  // the answer where none was told

Word relay(int function, Arguments arguments);

template <int Number>
Word entry(Word a, Word b, Word c, Word d, Word e, Word f) {
    return relay(Number, {a, b, c, d, e, f});
}

template <int... Numbers>
void** table(std::integer_sequence<int, Numbers...>) {
    static void* entries[] = {nullptr, const_cast<std::type_info*>(&typeid(Thing)), reinterpret_cast<void*>(&entry<Numbers>)...};
    return entries + 2;  // typeid and dynamic_cast read the two before the functions
}

bool recording() {
    char const* mode = std::getenv("RELAY");
    return mode && std::string(mode) == "record";
}

// Never freed: the process ends soon.
Word make(std::string const& kind, Word real) {
    auto* thing = new Thing{table(std::make_integer_sequence<int, FUNCTIONS>{}), nullptr, kind, real};
    thing->implementation = thing;
    auto const address = reinterpret_cast<Word>(thing);
    things.insert(address);
    return address;
}

// The same Thing for the same object, as the bindings go by addresses.
Word wrap(std::string const& kind, Word real) {
    if (real == 0) return 0;
    Word& thing = wrapped[{kind, real}];
    return thing ? thing : thing = make(kind, real);
}

Word unwrap(Word word) { return things.count(word) ? reinterpret_cast<Thing*>(word)->real : word; }

std::map<Key, Route> const& routes() {
    static std::map<Key, Route> const read = [] {
        std::map<Key, Route> lines;
        char const* path = std::getenv("RELAY");
        std::ifstream file(path ? path : "");
        std::string kind, result, numbers;
        for (int from = 0, to = 0; file >> kind >> from >> to >> result >> numbers;) {
            lines[{kind, from}] = {to, result, {}};
            std::istringstream pairs(numbers);
            char between = 0;
            for (Word old = 0, now = 0; pairs >> old >> between >> now; pairs >> between) lines[{kind, from}].numbers[old] = now;
        }
        return lines;
    }();
    return read;
}

Word pass_on(Key const& key, bool structure, Arguments arguments) {
    auto const found = routes().find(key);
    if (found == routes().end()) {
        std::fprintf(stderr, "relay: nobody said where function %d of %s goes\n", key.second, key.first.c_str());
        std::abort();
    }
    for (Word& argument : arguments) argument = unwrap(argument);
    Word& self = arguments[structure];
    Word& first = arguments[structure + 1];
    auto const number = found->second.numbers.find(first);
    if (number != found->second.numbers.end()) first = number->second;
    if (!DIRECT.count(key.first)) self = reinterpret_cast<Word*>(self)[1];
    auto const function = reinterpret_cast<Function*>(*reinterpret_cast<Word*>(self))[found->second.function];
    auto const [a, b, c, d, e, f] = arguments;
    Word const answer = function(a, b, c, d, e, f);
    return found->second.result == "-" ? answer : wrap(found->second.result, answer);
}

// Several answers to one function are given in turn, and then from the first again.
Answer next_answer(Key const& key) {
    auto const found = answers.find(key);
    if (found == answers.end()) return {"", unknown, {}};
    return found->second.at(turns[key]++ % found->second.size());
}

Word answer_as_told(Key const& key, bool structure, Arguments const& arguments) {
    Answer const answer = next_answer(key);
    if (structure) {
        auto* words = reinterpret_cast<std::int64_t*>(arguments[0]);
        *words++ = static_cast<std::int64_t>(answer.dims.size());
        for (std::int64_t const size : answer.dims) *words++ = size;
        return arguments[0];
    }
    return answer.kind.empty() ? answer.value : make(answer.kind, 0);
}

Word destroy(Thing const& thing, int function) {
    wrapped.erase({thing.kind, thing.real});
    return (*reinterpret_cast<Function**>(thing.real))[function](thing.real, 0, 0, 0, 0, 0);
}

// The object itself is the first argument, or the second behind the address that a returned structure is written to.
Word relay(int function, Arguments arguments) {
    bool const structure = !things.count(arguments[0]);
    auto const& thing = *reinterpret_cast<Thing*>(arguments[structure]);
    Key const key{thing.kind, function};
    if (!DIRECT.count(thing.kind) && function < DESTRUCTORS) return recording() ? 0 : destroy(thing, function);
    calls.push_back({thing.kind, function, arguments});
    return recording() ? answer_as_told(key, structure, arguments) : pass_on(key, structure, arguments);
}

template <class Signature>
Signature* symbol(char const* library, char const* name) {
    void* const handle = dlopen(library, RTLD_NOW | RTLD_GLOBAL);
    void* const found = handle ? dlsym(handle, name) : nullptr;
    if (!found) {
        std::fprintf(stderr, "relay: %s\n", dlerror());
        std::abort();
    }
    return reinterpret_cast<Signature*>(found);
}

// A logger as TensorRT 11 and TensorRT-RTX call it, for one of the bindings of TensorRT 10, of which `log` is the first function.
class Logger {
   public:
    explicit Logger(Word theirs) : theirs_(theirs) {}
    struct Info {
        char const* kind;
        std::int32_t major, minor;
    };
    virtual std::int32_t language() const { return 0; }  // C++
    virtual Info info() const { return {"ILogger", 1, 0}; }
    virtual ~Logger() = default;
    virtual void log(std::int32_t severity, char const* text) {
        auto const first = **reinterpret_cast<void (***)(Word, std::int32_t, char const*)>(theirs_);
        first(theirs_, severity, text);
    }

   private:
    Word theirs_;
};

Word logger_for_rtx(Word theirs) {
    bool const plain = std::getenv("RELAY_LOGGER") != nullptr;
    return plain ? reinterpret_cast<Word>(new Logger(theirs)) : theirs;
}

std::int32_t infer_version() { return symbol<std::int32_t()>(INFER, "getInferLibVersion")(); }
std::int32_t parser_version() { return symbol<std::int32_t()>(PARSER, "getNvOnnxParserVersion")(); }

Word create(char const* kind, char const* library, char const* name, Word logger, std::int32_t version) {
    return wrap(kind, symbol<Word(Word, std::int32_t)>(library, name)(logger_for_rtx(logger), version));
}

Word create(char const* kind, char const* library, char const* name, Word of, Word logger, std::int32_t version) {
    return wrap(kind, symbol<Word(Word, Word, std::int32_t)>(library, name)(unwrap(of), logger_for_rtx(logger), version));
}

}  // namespace

// What the bindings import. Each asks for the version that it was compiled with, and TensorRT-RTX gets its own.
extern "C" {

Word createInferBuilder_INTERNAL(Word logger, std::int32_t) {
    return recording() ? make("Builder", 0) : create("Builder", INFER, __func__, logger, infer_version());
}

Word createInferRuntime_INTERNAL(Word logger, std::int32_t) {
    return recording() ? make("Runtime", 0) : create("Runtime", INFER, __func__, logger, infer_version());
}

Word createInferRefitter_INTERNAL(Word engine, Word logger, std::int32_t) {
    return recording() ? make("Refitter", 0) : create("Refitter", INFER, __func__, engine, logger, infer_version());
}

Word createNvOnnxParser_INTERNAL(Word network, Word logger, std::int32_t) {
    return recording() ? make("OnnxParser", 0) : create("OnnxParser", PARSER, __func__, network, logger, parser_version());
}

Word createNvOnnxParserRefitter_INTERNAL(Word refitter, Word logger, std::int32_t) {
    if (recording()) return make("OnnxParserRefitter", 0);
    return create("OnnxParserRefitter", PARSER, __func__, refitter, logger, parser_version());
}

std::int32_t getNvOnnxParserVersion() { return recording() ? 0 : parser_version(); }
Word getPluginRegistry() { return 0; }
Word getBuilderPluginRegistry(std::int32_t) { return 0; }
bool initLibNvInferPlugins(void*, char const*) { return true; }

// For Python, by ctypes: the calls so far, and what to answer.
std::size_t relay_calls() { return calls.size(); }
char const* relay_kind(std::size_t index) { return calls.at(index).kind.c_str(); }
int relay_function(std::size_t index) { return calls.at(index).function; }
Word relay_argument(std::size_t index, int which) { return calls.at(index).arguments.at(which); }
void relay_unknown(Word value) { unknown = value; }

void relay_forget(char const* kind, int function) {
    answers.erase({kind, function});
    turns.erase({kind, function});
}

void relay_answer(char const* kind, int function, char const* result, Word value, std::int64_t const* dims, int count) {
    answers[{kind, function}].push_back({result, value, {dims, dims + count}});
}
}
