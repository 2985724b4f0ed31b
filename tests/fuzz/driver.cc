#include "driver.h"

#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

// Of the sanitizers' common interface.
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());

// That callback is not called for undefined behaviour, so it ends in a signal.
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }
extern "C" const char* __asan_default_options() { return "exitcode=3"; }
extern "C" const char* __tsan_default_options() { return "halt_on_error=1"; }

namespace deform_conv::fuzz {
namespace {

constexpr unsigned kSecondsPerCase = 60;

std::string command;  // that runs one case of this seed again, but for its number
int64_t case_number = -1;
bool print_numbers = false;
std::shared_ptr<const Problem> described_problem;
std::string described_details;

void PrintDescription() {
  if (!described_details.empty()) std::printf("  %s\n", described_details.c_str());
  if (described_problem != nullptr) {
    std::printf("%s\n", Describe(*described_problem, print_numbers).c_str());
  }
  std::fflush(stdout);
}

// The one place that reports, also when the process dies: the command comes first.
void Report(const char* what) {
  std::printf("FINDING in case %lld: %s\n  again: %s --case %lld\n",
              static_cast<long long>(case_number), what, command.c_str(),
              static_cast<long long>(case_number));
  std::fflush(stdout);
  PrintDescription();
}

void ReportDeath() {
  static bool reported = false;
  if (reported || case_number < 0) return;
  reported = true;
  Report("the process ended");
}

void ReportSignal(int signal_number) {
  if (signal_number == SIGALRM) {
    Report("it has taken a minute");
    _exit(3);
  }
  ReportDeath();
  signal(signal_number, SIG_DFL);
  raise(signal_number);
}

void WatchForDeath() {
  if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(ReportDeath);
  for (const int number : {SIGABRT, SIGALRM}) signal(number, ReportSignal);
  if (__sanitizer_set_death_callback != nullptr) return;  // it has handlers of its own
  for (const int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) signal(number, ReportSignal);
}

const Kind& DrawKind(Random& random, const std::vector<Kind>& kinds) {
  double left = random.Unit();
  for (const Kind& kind : kinds) {
    left -= kind.share;
    if (left < 0) return kind;
  }
  return kinds.front();
}

[[noreturn]] void StopWithUsage(const std::string& program, const std::string& extra_help,
                                const std::string& error) {
  std::fprintf(error.empty() ? stdout : stderr,
               "%s%s [--seed S] [--seconds T] [--cases N] [--first N] [--findings N] [--kind K] "
               "[--case N]\n%s",
               error.empty() ? "" : (error + "\n").c_str(), program.c_str(), extra_help.c_str());
  std::exit(error.empty() ? 0 : 2);
}

}  // namespace

Options ReadOptions(int argc, char** argv, const std::string& extra_help,
                    const std::function<bool(const std::string&, const std::string&)>& extra) {
  Options options;
  options.seed = static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch() /
                                       std::chrono::milliseconds(1));
  std::string program_options;
  bool limited = false;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (name == "--help" || name == "-h") StopWithUsage(argv[0], extra_help, "");
    if (i + 1 == argc) StopWithUsage(argv[0], extra_help, name + " takes a value");
    const std::string value = argv[i + 1];
    char* end = nullptr;
    const double number = std::strtod(value.c_str(), &end);
    const bool is_number = *end == '\0' && end != value.c_str();
    if (name == "--kind") {
      options.kind = value;
    } else if (extra(name, value)) {
      program_options += " " + name + " " + value;
    } else if (!is_number) {
      StopWithUsage(argv[0], extra_help, name + " " + value + " is not known");
    } else if (name == "--seed") {
      options.seed = std::strtoull(value.c_str(), nullptr, 10);
    } else if (name == "--seconds") {
      options.seconds = number;
      limited = true;
    } else if (name == "--cases") {
      options.cases = static_cast<int64_t>(number);
      if (!limited) options.seconds = 1e9;
    } else if (name == "--first") {
      options.first = static_cast<int64_t>(number);
    } else if (name == "--findings") {
      options.most_findings = static_cast<int64_t>(number);
    } else if (name == "--case") {
      options.first = static_cast<int64_t>(number);
      options.cases = 1;
      options.one_case = true;
    } else {
      StopWithUsage(argv[0], extra_help, name + " is not known");
    }
  }
  command = std::string(argv[0]) + " --seed " + std::to_string(options.seed) + program_options;
  return options;
}

int RunCases(const Options& options, const std::vector<Kind>& kinds) {
  WatchForDeath();
  print_numbers = options.one_case;
  std::printf("%s from case %lld\n", command.c_str(), static_cast<long long>(options.first));
  std::fflush(stdout);
  std::map<std::string, int64_t> counts;
  int64_t done = 0, findings = 0;
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [start] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  for (int64_t i = 0; i < options.cases && findings < options.most_findings; ++i) {
    if (!options.one_case && elapsed() >= options.seconds) break;
    case_number = options.first + i;
    Random random(options.seed, static_cast<uint64_t>(case_number));
    const Kind& kind = DrawKind(random, kinds);
    if (!options.kind.empty() && options.kind != kind.name) continue;
    Describe(nullptr, "");
    alarm(kSecondsPerCase);
    try {
      kind.run(random);
    } catch (const Finding& finding) {
      Report(finding.what());
      ++findings;
    } catch (const std::exception& exception) {
      Report((std::string("the core threw: ") + exception.what()).c_str());
      ++findings;
    }
    ++counts[kind.name];
    ++done;
  }
  alarm(0);
  if (options.one_case && findings == 0) PrintDescription();
  case_number = -1;
  std::printf("%lld cases (", static_cast<long long>(done));
  const char* separator = "";
  for (const auto& [kind, count] : counts) {
    std::printf("%s%s %lld", separator, kind.c_str(), static_cast<long long>(count));
    separator = ", ";
  }
  std::printf("), %.0f per second, %lld findings\n", done / elapsed(),
              static_cast<long long>(findings));
  std::fflush(stdout);
  return findings == 0 ? 0 : 1;
}

void Describe(std::shared_ptr<const Problem> problem, const std::string& details) {
  described_problem = std::move(problem);
  described_details = details;
}

void ExpectErrorText(const std::string& error) {
  if (error.find('\n') != std::string::npos) throw Finding("an error of several lines: " + error);
  for (const char* argument : {"input", "filters", "offset", "mask", "weights", "kernel_size",
                               "strides", "dilations", "padding", "deform_groups"}) {
    if (error.find(argument) != std::string::npos) return;
  }
  throw Finding("an error that names no argument: " + error);
}

}  // namespace deform_conv::fuzz
