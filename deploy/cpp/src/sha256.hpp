#pragma once

#include <filesystem>
#include <string>

namespace vitprune {

/// The SHA-256 of the file's bytes, in hexadecimal; empty where the file cannot be read.
std::string sha256_file(const std::filesystem::path& path);

}  // namespace vitprune
