// Where instructions come from: .file, .loc and what else says nothing about the run.
#include "parser.h"

namespace emulator {

bool Parser::inert_statement() {
  if (accept(".pragma")) {
    do take(Token::Kind::kString, "a string");
    while (accept(","));
    expect(";");
  } else if (accept(".loc")) {
    location();
  } else if (!function_ && accept(".file")) {
    file();
  } else if (!function_ && accept(".section")) {
    take(Token::Kind::kWord, "a section name");
    skip_group("{", "}");
  } else {
    return false;
  }
  return true;
}

void Parser::file() {
  const int line = peek().line;
  const auto number = static_cast<int>(integer(INT32_MAX));
  const std::string_view path = take(Token::Kind::kString, "a file name").text;
  if (!file_numbers_.try_emplace(number, static_cast<int>(module_.files.size())).second) {
    fail(line, "a file of this number was declared before");
  }
  module_.files.emplace_back(path.substr(1, path.size() - 2));
  for (int i = 0; i < 2 && accept(","); ++i) integer();  // time stamp and size
}

// .loc file line column {, function_name label {+ offset}, inlined_at file line column}
void Parser::location() {
  file_ = static_cast<int>(integer(INT32_MAX));
  source_line_ = static_cast<int>(integer(INT32_MAX));
  integer();
  while (accept(",")) {
    if (accept("function_name")) {
      name("a label");
      if (accept("+")) integer();
    } else {
      expect("inlined_at");
      for (int i = 0; i < 3; ++i) integer();
    }
  }
}

}  // namespace emulator
