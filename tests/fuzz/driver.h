// What the programs share: their command line, the loop over cases, and the report of a finding.

#ifndef DEFORM_CONV_TESTS_FUZZ_DRIVER_H_
#define DEFORM_CONV_TESTS_FUZZ_DRIVER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "problem.h"
#include "random.h"

namespace deform_conv::fuzz {

// What must not be. Thrown by a case.
class Finding : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Options {
  uint64_t seed;
  int64_t first = 0;           // number of the first case
  int64_t cases = INT64_MAX;   // how many
  double seconds = 10;         // after which no case begins
  int64_t most_findings = 10;  // after which no case begins
  bool one_case = false;       // then the values are printed too
  std::string kind;            // cases of this kind only; the others are passed over
};

// Reads the command line. Exits where it is wrong, or asks for help. `extra(name, value)` returns
// whether it knows an option of the program's own, and `extra_help` explains those.
Options ReadOptions(int argc, char** argv, const std::string& extra_help,
                    const std::function<bool(const std::string&, const std::string&)>& extra);

struct Kind {
  const char* name;
  double share;  // of all cases
  std::function<void(Random& random)> run;
};

// Runs cases of these kinds and prints the findings; also one that ends the process or takes a
// minute. Returns the exit status.
int RunCases(const Options& options, const std::vector<Kind>& kinds);

// What the report of a finding says of the case. Kept until the next case.
void Describe(std::shared_ptr<const Problem> problem, const std::string& details);

// An error text of the core: one line that names an argument.
void ExpectErrorText(const std::string& error);

}  // namespace deform_conv::fuzz

#endif  // DEFORM_CONV_TESTS_FUZZ_DRIVER_H_
