// Passing an error message on to the caller.

#ifndef DEFORM_CONV_CORE_RETURN_IF_ERROR_H_
#define DEFORM_CONV_CORE_RETURN_IF_ERROR_H_

#include <string>

// For functions that return an empty string, or what went wrong.
#define DEFORM_CONV_RETURN_IF_ERROR(expression)                         \
  do {                                                                  \
    if (std::string error = (expression); !error.empty()) return error; \
  } while (false)

#endif  // DEFORM_CONV_CORE_RETURN_IF_ERROR_H_
