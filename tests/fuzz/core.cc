// Tries the core on the CPU with random problems: results against a loop over the formula, memory
// beside the tensors, allocations and threads that fail, wrong sizes, and conversions of layout.

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "allocations.h"
#include "buffer.h"
#include "core/cpu/kernels.h"
#include "core/deform_conv2d.h"
#include "core_kinds.h"
#include "driver.h"
#include "problem.h"
#include "reference.h"
#include "run_functions.h"

namespace deform_conv::fuzz {
namespace {

constexpr int kMostThreads = 8;

Pool& SharedPool() {
  static Pool pool(kMostThreads - 1);
  return pool;
}

// --- How the core is called ---

enum class RunWay { kPool, kNewThreads, kBackwards };

struct CallSettings {
  CpuThreads threads;
  RunWay way;
  bool want_input, want_filters, want_offset, want_mask;
  bool add_filters;
};

CallSettings DrawSettings(Random& random, const DeformConvParams& params) {
  CallSettings settings = {};
  settings.threads.count = random.Pick({1, 1, 1, 2, 3, kMostThreads});
  const int way = static_cast<int>(random.Between(0, 29));
  settings.way = way < 14 ? RunWay::kPool : way < 28 ? RunWay::kBackwards : RunWay::kNewThreads;
  if (settings.threads.count > 1) {
    settings.threads.run = [way = settings.way](int count, const Pool::Work& work) {
      if (way == RunWay::kPool) return SharedPool().Run(count, work);
      way == RunWay::kNewThreads ? RunOnNewThreads(count, work) : RunBackwards(count, work);
    };
  }
  const int64_t subset = random.Chance(0.4) ? 15 : random.Between(0, 15);
  settings.want_input = subset & 1;
  settings.want_filters = params.has_filters && (subset & 2);
  settings.want_offset = subset & 4;
  settings.want_mask = params.has_mask && (subset & 8);
  settings.add_filters = random.Chance(0.3);
  return settings;
}

std::string TextOf(const CallSettings& settings) {
  const char* const ways[] = {"on a pool", "on new threads", "one after the other"};
  std::string text = std::to_string(settings.threads.count) + " threads";
  if (settings.threads.count > 1) text += std::string(" ") + ways[static_cast<int>(settings.way)];
  text += ", gradients of";
  if (settings.want_input) text += " input";
  if (settings.want_filters) text += settings.add_filters ? " filters (added)" : " filters";
  if (settings.want_offset) text += " offset";
  if (settings.want_mask) text += " mask";
  return text;
}

// --- A problem's tensors, and the calls ---

template <typename T>
class Tensors {
 public:
  Tensors(Random& random, const Problem& problem, const CallSettings& settings)
      : problem_(problem),
        settings_(settings),
        input_(random, "input", Size(problem.input)),
        filters_(random, "filters", problem.shapes.has_filters ? Size(problem.filters) : 0),
        offset_(random, "offset", Size(problem.offset)),
        mask_(random, "mask", Size(problem.mask)),
        grad_output_(random, "grad_output", Size(problem.grad_output)),
        output_(random, "output", Size(problem.grad_output)),
        grad_input_(random, "grad_input", settings.want_input ? Size(problem.input) : 0),
        grad_filters_(random, "grad_filters", settings.want_filters ? Size(problem.filters) : 0),
        grad_offset_(random, "grad_offset", settings.want_offset ? Size(problem.offset) : 0),
        grad_mask_(random, "grad_mask", settings.want_mask ? Size(problem.mask) : 0) {
    input_.Fill(problem.input);
    if (problem.shapes.has_filters) filters_.Fill(problem.filters);
    offset_.Fill(problem.offset);
    mask_.Fill(problem.mask);
    grad_output_.Fill(problem.grad_output);
  }

  void Poison() {
    for (Buffer<T>* result : Results()) result->Poison();
    if (settings_.add_filters && settings_.want_filters)
      grad_filters_.Fill(problem_.filters_before);
  }

  void Forward(const DeformConvParams& params, const CpuThreads& threads) {
    DeformConv2DForwardCpu<T>(params, Sampled(), Filters(), threads, output_.data());
  }

  void Backward(const DeformConvParams& params, const CpuThreads& threads) {
    const DeformConvGradients<T> gradients = {
        {settings_.want_input ? grad_input_.data() : nullptr,
         settings_.want_offset ? grad_offset_.data() : nullptr,
         settings_.want_mask ? grad_mask_.data() : nullptr},
        settings_.want_filters ? grad_filters_.data() : nullptr};
    DeformConv2DBackwardCpu<T>(params, Sampled(), Filters(), grad_output_.data(), threads,
                               settings_.add_filters, gradients);
  }

  void ExpectArgumentsUnchanged() {
    for (Buffer<T>* argument : {&input_, &filters_, &offset_, &mask_, &grad_output_}) {
      argument->ExpectUnchanged();
    }
    for (Buffer<T>* result : Results()) result->ExpectGuardsAreWhole();
  }

  void ExpectResults(Reference& reference) {
    const DeformConvShapes& shapes = problem_.shapes;
    const Rounding rounding = RoundingOf(problem_);
    if (settings_.want_filters && settings_.add_filters) {
      Expected& filters = reference.grad_filters;
      for (size_t i = 0; i < filters.values.size(); ++i) {
        filters.values[i] += problem_.filters_before[i];
        filters.magnitudes[i] += std::fabs(problem_.filters_before[i]);
      }
      ++filters.additions;
    }
    const std::array<int64_t, 4> output = {shapes.offset[0], shapes.offset[1], shapes.offset[2],
                                           problem_.params.out_channels};
    Expect(output_, reference.output, output, rounding);
    if (settings_.want_input) Expect(grad_input_, reference.grad_input, shapes.input, rounding);
    if (settings_.want_filters) {
      Expect(grad_filters_, reference.grad_filters, shapes.filters, rounding);
    }
    if (settings_.want_offset) Expect(grad_offset_, reference.grad_offset, shapes.offset, rounding);
    if (settings_.want_mask) Expect(grad_mask_, reference.grad_mask, shapes.mask, rounding);
  }

  // All results, one after the other.
  std::vector<T> Bits() {
    std::vector<T> bits;
    for (Buffer<T>* result : Results()) {
      const std::vector<T> elements = result->Elements();
      bits.insert(bits.end(), elements.begin(), elements.end());
    }
    return bits;
  }

 private:
  static int64_t Size(const std::vector<double>& values) {
    return static_cast<int64_t>(values.size());
  }

  std::array<Buffer<T>*, 5> Results() {
    return {&output_, &grad_input_, &grad_filters_, &grad_offset_, &grad_mask_};
  }

  SampledTensors<T> Sampled() {
    return {input_.data(), offset_.data(), problem_.shapes.has_mask ? mask_.data() : nullptr};
  }

  const T* Filters() { return problem_.shapes.has_filters ? filters_.data() : nullptr; }

  static void Expect(Buffer<T>& actual, const Expected& expected,
                     const std::array<int64_t, 4>& shape, const Rounding& rounding) {
    actual.ExpectWritten();
    const std::string error =
        Compare(actual.name(), expected, actual.Values(), {shape.begin(), shape.end()}, rounding);
    if (!error.empty()) throw Finding(error);
  }

  const Problem& problem_;
  const CallSettings& settings_;
  Buffer<T> input_, filters_, offset_, mask_, grad_output_;
  Buffer<T> output_, grad_input_, grad_filters_, grad_offset_, grad_mask_;
};

// --- Kinds of cases ---

void ExpectParams(const DeformConvParams& actual, const DeformConvParams& expected) {
  const auto expect = [](const char* name, int64_t is, int64_t expected_size) {
    if (is == expected_size) return;
    throw Finding(std::string("params.") + name + " is " + std::to_string(is) + "; " +
                  std::to_string(expected_size) + " expected");
  };
#define DEFORM_CONV_EXPECT(name) expect(#name, actual.name, expected.name)
  DEFORM_CONV_EXPECT(batch);
  DEFORM_CONV_EXPECT(in_h);
  DEFORM_CONV_EXPECT(in_w);
  DEFORM_CONV_EXPECT(in_channels);
  DEFORM_CONV_EXPECT(out_h);
  DEFORM_CONV_EXPECT(out_w);
  DEFORM_CONV_EXPECT(out_channels);
  DEFORM_CONV_EXPECT(kernel_h);
  DEFORM_CONV_EXPECT(kernel_w);
  DEFORM_CONV_EXPECT(stride_h);
  DEFORM_CONV_EXPECT(stride_w);
  DEFORM_CONV_EXPECT(dilation_h);
  DEFORM_CONV_EXPECT(dilation_w);
  DEFORM_CONV_EXPECT(pad_top);
  DEFORM_CONV_EXPECT(pad_left);
  DEFORM_CONV_EXPECT(groups);
  DEFORM_CONV_EXPECT(deform_groups);
  DEFORM_CONV_EXPECT(has_mask);
  DEFORM_CONV_EXPECT(has_filters);
#undef DEFORM_CONV_EXPECT
}

DeformConvParams ParamsOf(const Problem& problem) {
  DeformConvParams params;
  const std::string error = MakeParams(problem.attributes, problem.shapes, &params);
  if (!error.empty()) throw Finding("valid sizes are refused: " + error);
  ExpectParams(params, problem.params);
  return params;
}

// Results and repeatability.
template <typename T>
void RunResults(Random& random) {
  const auto problem =
      std::make_shared<const Problem>(DrawProblem(random, ElementTypeOf<T>::value, kShaping));
  const CallSettings settings = DrawSettings(random, problem->params);
  Describe(problem, TextOf(settings));
  const DeformConvParams params = ParamsOf(*problem);
  Tensors<T> tensors(random, *problem, settings);
  const auto call = [&] {
    tensors.Poison();
    tensors.Forward(params, settings.threads);
    tensors.Backward(params, settings.threads);
  };
  call();
  tensors.ExpectArgumentsUnchanged();
  const bool backward =
      settings.want_input || settings.want_filters || settings.want_offset || settings.want_mask;
  Reference reference = Compute(*problem, backward);
  tensors.ExpectResults(reference);
  if (!random.Chance(0.1)) return;
  const std::vector<T> bits = tensors.Bits();
  call();
  const std::vector<T> again = tensors.Bits();
  if (!bits.empty() && std::memcmp(bits.data(), again.data(), bits.size() * sizeof(T)) != 0) {
    throw Finding("a second run gives other bits");
  }
}

// What a call ends in.
enum class Ending { kReturn, kBadAlloc, kSystemError };

template <typename Call>
Ending EndingOf(const Call& call) {
  try {
    call();
    return Ending::kReturn;
  } catch (const std::bad_alloc&) {
    return Ending::kBadAlloc;
  } catch (const std::system_error&) {
    return Ending::kSystemError;
  } catch (...) {
    throw Finding("an exception that nobody threw");
  }
}

// Allocations that fail, and threads that cannot be started; then the same call without.
template <typename T>
void RunFailures(Random& random) {
  SharedPool();  // or its threads would count as memory that the first call loses
  Problem drawn = DrawProblem(random, ElementTypeOf<T>::value, kShaping);
  while (drawn.params.out_positions() * drawn.params.filters_size() > 20000) {
    drawn = DrawProblem(random, ElementTypeOf<T>::value, kShaping);
  }
  const auto problem = std::make_shared<const Problem>(std::move(drawn));
  CallSettings settings = DrawSettings(random, problem->params);
  if (settings.way == RunWay::kNewThreads) settings.threads.count = 1;  // those allocate
  Describe(problem, TextOf(settings));
  const DeformConvParams params = ParamsOf(*problem);
  Tensors<T> tensors(random, *problem, settings);
  // Calls with `threads`, and checks that no memory is lost.
  const auto ending_of = [&](bool forward, const CpuThreads& threads, int64_t first_failure,
                             bool all_after, int64_t* allocations) {
    tensors.Poison();
    Ending ending;
    const int64_t before = LiveAllocations();
    {
      const AllocationFailures failures(first_failure, all_after);
      ending = EndingOf(
          [&] { forward ? tensors.Forward(params, threads) : tensors.Backward(params, threads); });
      *allocations = failures.count();
    }
    if (LiveAllocations() != before) {
      throw Finding(std::to_string(LiveAllocations() - before) + " allocations were lost");
    }
    tensors.ExpectArgumentsUnchanged();
    return ending;
  };
  for (const bool forward : {true, false}) {
    const std::string pass = forward ? "forward" : "backward";
    int64_t allocations;
    if (ending_of(forward, settings.threads, 0, false, &allocations) != Ending::kReturn) {
      throw Finding(pass + " throws");
    }
    for (int tries = 0; tries < 3 && allocations > 0; ++tries) {
      const int64_t first_failure = random.Between(1, allocations);
      const bool all_after = random.Chance(0.3);
      int64_t reached;
      const Ending ending =
          ending_of(forward, settings.threads, first_failure, all_after, &reached);
      // How many there are depends on which threads find work.
      if (ending == Ending::kBadAlloc || (ending == Ending::kReturn && reached < first_failure)) {
        continue;
      }
      throw Finding(pass + " does not end in std::bad_alloc where allocation " +
                    std::to_string(first_failure) + " fails");
    }
    if (settings.threads.count == 1) continue;
    CpuThreads failing = settings.threads;
    bool thrown = false;
    failing.run = [&](int count, const Pool::Work& work) {
      const int started = static_cast<int>(random.Between(0, count));
      thrown = thrown || started < count;
      RunSome(started, count, work);
    };
    const Ending ending = ending_of(forward, failing, 0, false, &allocations);
    if (ending != (thrown ? Ending::kSystemError : Ending::kReturn)) {
      throw Finding(pass + " does not pass on that a thread cannot be started");
    }
  }
  tensors.Poison();
  tensors.Forward(params, settings.threads);
  tensors.Backward(params, settings.threads);
  Reference reference = Compute(*problem, true);
  tensors.ExpectResults(reference);
}

int Main(int argc, char** argv) {
  std::string isa;
  const Options options =
      ReadOptions(argc, argv, "  --isa I    instruction set: baseline, avx2, avx512\n",
                  [&isa](const std::string& name, const std::string& value) {
                    if (name != "--isa") return false;
                    isa = value;
                    return isa == "baseline" || isa == "avx2" || isa == "avx512";
                  });
  if (!isa.empty()) setenv("DEFORM_CONV_CPU_ISA", isa.c_str(), 1);
  if (!isa.empty() && isa != CpuInstructionSet()) {
    std::printf("this processor has no %s\n", isa.c_str());
    return 0;
  }
  std::printf("instruction set %s\n", CpuInstructionSet());
  return RunCases(options, {{"float", 0.5, RunResults<float>},
                            {"double", 0.22, RunResults<double>},
                            {"failures of float", 0.04, RunFailures<float>},
                            {"failures of double", 0.02, RunFailures<double>},
                            {"sizes", 0.14, RunSizes},
                            {"layout", 0.08, RunLayout}});
}

}  // namespace
}  // namespace deform_conv::fuzz

int main(int argc, char** argv) { return deform_conv::fuzz::Main(argc, argv); }
