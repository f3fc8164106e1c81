// What the user can mend: one line and an exit code, the same codes as mmchat's.
#pragma once

#include <stdexcept>
#include <string>

enum ExitCode { kOther = 1, kUsage = 2, kModel = 3, kPicture = 4, kMemory = 5, kDisk = 7 };

struct Failure : std::runtime_error {
  Failure(ExitCode exit_code, const std::string& text)
      : std::runtime_error(text), code(exit_code) {}
  ExitCode code;
};
