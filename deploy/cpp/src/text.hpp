#pragma once

#include <sstream>
#include <string>

namespace vitprune {

/// All arguments behind one another, as text.
template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

/// The items with ", " between them.
template <typename Items>
std::string joined(const Items& items) {
  std::string out;
  for (const auto& item : items) out += (out.empty() ? "" : ", ") + text(item);
  return out;
}

/// One line, however many the runtime wrote.
inline std::string one_line(const std::string& lines) {
  std::istringstream in(lines);
  std::string out;
  for (std::string word; in >> word;) out += (out.empty() ? "" : " ") + word;
  return out;
}

}  // namespace vitprune
