#include "tokens.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <sstream>

#include "failure.h"

namespace {

constexpr size_t kNone = std::numeric_limits<size_t>::max();
constexpr size_t kLongestRun = 25000;  // mmchat cuts longer runs without a space
const std::string kReplacement = "\xEF\xBF\xBD";

// Length of the UTF-8 character at the start of `bytes`; 0: more bytes are needed; negative: so many
// bytes are no UTF-8.
int utf8_length(std::string_view bytes, char32_t& code) {
  const auto lead = static_cast<uint8_t>(bytes[0]);
  code = lead;
  if (lead < 0x80) return 1;
  if (lead < 0xC2 || lead > 0xF4) return -1;
  const int length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  code = lead & (0x7F >> length);
  for (int i = 1; i < length; ++i) {
    if (i == static_cast<int>(bytes.size())) return 0;
    const auto next = static_cast<uint8_t>(bytes[i]);
    uint8_t low = 0x80, high = 0xBF;
    if (i == 1 && lead == 0xE0) low = 0xA0;
    if (i == 1 && lead == 0xED) high = 0x9F;
    if (i == 1 && lead == 0xF0) low = 0x90;
    if (i == 1 && lead == 0xF4) high = 0x8F;
    if (next < low || next > high) return -i;
    code = code << 6 | (next & 0x3F);
  }
  return length;
}

bool is_space(char32_t c) {  // White_Space of Unicode
  return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

bool is_newline(char32_t c) { return c == '\r' || c == '\n'; }

std::string from_hex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i + 1 < hex.size(); i += 2)
    bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  return bytes;
}

// Whether a contraction ('s, 't, 're, 've, 'm, 'll, 'd) begins at the apostrophe; its length.
size_t contraction(const std::u32string& text, size_t at) {
  const auto lower = [&](size_t i) -> char32_t {
    if (i >= text.size()) return 0;
    if (text[i] == 0x17F) return 's';  // the long s folds to s
    return text[i] >= 'A' && text[i] <= 'Z' ? text[i] + 32 : text[i];
  };
  if (text[at] != '\'') return 0;
  const char32_t first = lower(at + 1), second = lower(at + 2);
  if (first == 's' || first == 't' || first == 'm' || first == 'd') return 2;
  const bool two = (first == 'r' && second == 'e') || (first == 'v' && second == 'e') ||
                   (first == 'l' && second == 'l');
  return two ? 3 : 0;
}

}  // namespace

// ---- the table ------------------------------------------------------------------------------------

Tokens::Tokens(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  if (!std::getline(file, line))
    throw Failure(kModel, "'" + path + "' is missing; export the model again with mmchat export");
  if (line != "mmchat tokens 1")
    throw Failure(kModel, "'" + path + "' is of another version; export the model again");
  while (std::getline(file, line)) {
    std::istringstream fields(line);
    std::string what, value;
    int64_t id = -1;
    fields >> what;
    if (what == "letters" || what == "numbers") {
      char32_t first = 0, last = 0;
      unsigned long a, b;
      while (fields >> std::hex >> a && fields.ignore(1) && fields >> b) {
        first = a, last = b;
        (what == "letters" ? letters_ : numbers_).emplace_back(first, last);
      }
      continue;
    }
    if (!(fields >> id >> value)) throw Failure(kModel, "'" + path + "' is damaged: " + line);
    if (what == "special") {
      specials_[value] = id;
      special_ids_[id] = value;
    } else {
      tokens_.push_back(from_hex(value));
      ranks_[tokens_.back()] = tokens_.size() - 1;
      if (id + 1 != static_cast<int64_t>(tokens_.size()))
        throw Failure(kModel, "'" + path + "' is damaged: " + line);
    }
  }
}

int64_t Tokens::special(const std::string& name) const {
  const auto found = specials_.find(name);
  if (found == specials_.end()) throw Failure(kModel, "the tokenizer has no '" + name + "'");
  return found->second;
}

const std::string& Tokens::bytes(int64_t id) const {
  static const std::string kEmpty;
  return id >= 0 && id < static_cast<int64_t>(tokens_.size()) ? tokens_[id] : kEmpty;
}

// ---- text to ids ----------------------------------------------------------------------------------

Tokens::Kind Tokens::kind(char32_t character) const {
  const auto within = [&](const Ranges& ranges) {
    auto next = std::upper_bound(ranges.begin(), ranges.end(), std::pair{character, char32_t{0x10FFFF}});
    return next != ranges.begin() && character <= std::prev(next)->second;
  };
  if (within(letters_)) return Kind::kLetter;
  if (within(numbers_)) return Kind::kNumber;
  return is_space(character) ? Kind::kSpace : Kind::kOther;
}

// Where the piece that begins at `begin` ends. Llama 3 splits text by this regular expression, whose
// alternatives are tried in turn:
//   (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}
//   | ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
size_t Tokens::piece_end(const std::u32string& text, size_t begin) const {
  const auto is = [&](size_t at, Kind wanted) {
    return at < text.size() && kind(text[at]) == wanted;
  };
  const auto run = [&](size_t at, Kind wanted, size_t most = kNone) {
    for (; most && is(at, wanted); --most) ++at;
    return at;
  };
  if (const size_t length = contraction(text, begin)) return begin + length;
  const Kind first = kind(text[begin]);
  if (first == Kind::kLetter) return run(begin, Kind::kLetter);
  if (first != Kind::kNumber && !is_newline(text[begin]) && is(begin + 1, Kind::kLetter))
    return run(begin + 1, Kind::kLetter);
  if (first == Kind::kNumber) return run(begin, Kind::kNumber, 3);
  const size_t symbols = begin + (text[begin] == ' ');
  if (is(symbols, Kind::kOther)) {
    size_t end = run(symbols, Kind::kOther);
    while (end < text.size() && is_newline(text[end])) ++end;
    return end;
  }
  const size_t end = run(begin, Kind::kSpace);
  for (size_t at = end; at > begin; --at)
    if (is_newline(text[at - 1])) return at;
  return end < text.size() && end > begin + 1 ? end - 1 : end;  // the last one goes with what follows
}

size_t Tokens::rank(std::string_view bytes) const {
  const auto found = ranks_.find(std::string(bytes));
  return found == ranks_.end() ? kNone : found->second;
}

// Merge neighbours, the pair whose result has the lowest id first, until no pair makes a token.
void Tokens::merge(const std::string& piece, std::vector<int64_t>& ids) const {
  if (const size_t whole = rank(piece); whole != kNone) {
    ids.push_back(static_cast<int64_t>(whole));
    return;
  }
  const std::string_view bytes(piece);
  std::vector<size_t> begins(piece.size() + 1), ranks(piece.size(), kNone);
  for (size_t i = 0; i <= piece.size(); ++i) begins[i] = i;
  const auto pair_rank = [&](size_t i) {  // of parts i and i + 1
    if (i + 2 >= begins.size()) return kNone;
    return rank(bytes.substr(begins[i], begins[i + 2] - begins[i]));
  };
  for (size_t i = 0; i < ranks.size(); ++i) ranks[i] = pair_rank(i);
  while (true) {
    const auto lowest = std::min_element(ranks.begin(), ranks.end());
    if (*lowest == kNone) break;
    const size_t at = lowest - ranks.begin();
    begins.erase(begins.begin() + at + 1);
    ranks.erase(ranks.begin() + at + 1);
    ranks[at] = pair_rank(at);
    if (at > 0) ranks[at - 1] = pair_rank(at - 1);
  }
  for (size_t i = 0; i + 1 < begins.size(); ++i)
    ids.push_back(static_cast<int64_t>(rank(bytes.substr(begins[i], begins[i + 1] - begins[i]))));
}

std::vector<int64_t> Tokens::encode(std::string_view text) const {
  std::u32string characters;
  std::vector<size_t> offsets;  // of each character, and of the end, in bytes
  size_t at = 0, spaces = 0, others = 0;
  while (at < text.size()) {
    char32_t code = 0;
    const int length = utf8_length(text.substr(at), code);
    if (length <= 0) throw Failure(kUsage, "the prompt is not valid UTF-8");
    spaces = is_space(code) ? spaces + 1 : 0;
    others = is_space(code) ? 0 : others + 1;
    if (std::max(spaces, others) > kLongestRun)
      throw Failure(kUsage, "the prompt has a word of over 25,000 characters");
    characters += code;
    offsets.push_back(at);
    at += length;
  }
  offsets.push_back(at);
  std::vector<int64_t> ids;
  for (size_t begin = 0; begin < characters.size();) {
    const size_t end = piece_end(characters, begin);
    merge(std::string(text.substr(offsets[begin], offsets[end] - offsets[begin])), ids);
    begin = end;
  }
  return ids;
}

// ---- bytes to characters --------------------------------------------------------------------------

std::string Utf8Stream::push(std::string_view bytes) {
  held_ += bytes;
  return release(false);
}

std::string Utf8Stream::finish() { return release(true); }

std::string Utf8Stream::release(bool at_end) {
  std::string out;
  std::string_view rest(held_);
  while (!rest.empty()) {
    char32_t code = 0;
    int length = utf8_length(rest, code);
    if (length == 0 && !at_end) break;
    if (length == 0) length = -static_cast<int>(rest.size());
    const bool commands = (code < 0x20 && code != '\n' && code != '\t') ||
                          (code >= 0x7F && code < 0xA0);
    if (length < 0)
      out += kReplacement;
    else if (!(for_terminal_ && commands))
      out += rest.substr(0, length);
    rest.remove_prefix(std::abs(length));
  }
  held_ = rest;
  return out;
}
