#include "json.h"

#include <cctype>
#include <cstdlib>

#include "failure.h"

class JsonReader {
 public:
  JsonReader(std::string_view text, const std::string& where) : text_(text), where_(where) {}

  Json document() {
    Json found = value(0);
    skip_space();
    if (at_ != text_.size()) fail();
    return found;
  }

 private:
  [[noreturn]] void fail() const {
    throw Failure(kModel, where_ + ": not valid JSON at byte " + std::to_string(at_));
  }

  void skip_space() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
  }

  bool take(char wanted) {
    skip_space();
    if (at_ == text_.size() || text_[at_] != wanted) return false;
    ++at_;
    return true;
  }

  void expect(char wanted) {
    if (!take(wanted)) fail();
  }

  bool take_word(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  Json value(int depth) {
    if (depth > 32) fail();
    Json found;
    found.where_ = where_;
    skip_space();
    if (take('{')) {
      while (!take('}')) {
        if (!found.object_.empty()) expect(',');
        std::string key = string();
        expect(':');
        found.object_.emplace(std::move(key), value(depth + 1));
      }
    } else if (take('[')) {
      while (!take(']')) {
        if (!found.list_.empty()) expect(',');
        found.list_.push_back(value(depth + 1));
      }
    } else if (at_ < text_.size() && text_[at_] == '"') {
      found.text_ = string();
    } else if (take_word("true")) {
      found.number_ = 1;
    } else if (!take_word("false") && !take_word("null")) {
      found.number_ = number();
    }
    return found;
  }

  double number() {
    const size_t begin = at_;
    while (at_ < text_.size() && std::string_view("+-.eE0123456789").find(text_[at_]) != text_.npos)
      ++at_;
    const std::string digits(text_.substr(begin, at_ - begin));
    char* end = nullptr;
    const double found = std::strtod(digits.c_str(), &end);
    if (digits.empty() || *end) fail();
    return found;
  }

  unsigned hex4() {
    if (at_ + 4 > text_.size()) fail();
    char* end = nullptr;
    const std::string digits(text_.substr(at_, 4));
    const unsigned found = std::strtoul(digits.c_str(), &end, 16);
    if (*end) fail();
    at_ += 4;
    return found;
  }

  std::string string() {
    expect('"');
    std::string found;
    while (true) {
      if (at_ == text_.size()) fail();
      const char c = text_[at_++];
      if (c == '"') return found;
      if (c != '\\') {
        found += c;
        continue;
      }
      if (at_ == text_.size()) fail();
      escaped(text_[at_++], found);
    }
  }

  void escaped(char c, std::string& out) {
    static constexpr std::string_view kNames = "bfnrt\"\\/", kMeans = "\b\f\n\r\t\"\\/";
    if (const size_t index = kNames.find(c); index != kNames.npos) {
      out += kMeans[index];
      return;
    }
    if (c != 'u') fail();
    unsigned code = hex4();
    if (code >= 0xD800 && code < 0xDC00 && take_word("\\u"))
      code = 0x10000 + ((code - 0xD800) << 10) + (hex4() - 0xDC00);
    const int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    static constexpr unsigned kLead[] = {0x00, 0xC0, 0xE0, 0xF0};
    out += static_cast<char>(kLead[more] | (code >> (6 * more)));
    for (int i = more - 1; i >= 0; --i) out += static_cast<char>(0x80 | ((code >> (6 * i)) & 0x3F));
  }

  std::string_view text_;
  std::string where_;
  size_t at_ = 0;
};

Json Json::parse(std::string_view text, const std::string& where) {
  return JsonReader(text, where).document();
}

const Json& Json::operator[](const std::string& key) const {
  const auto found = object_.find(key);
  if (found == object_.end()) throw Failure(kModel, where_ + ": '" + key + "' is missing");
  return found->second;
}
