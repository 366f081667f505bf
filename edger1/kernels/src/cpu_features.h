// Which instruction sets this processor and operating system offer, asked once at run time.
#pragma once

#include <string>
#include <vector>

namespace edger1 {

// Names in rising order of preference, as the build knows them: "portable", "avx2", "avx512vnni", "neon-dotprod".
std::vector<std::string> instruction_sets();

} // namespace edger1
