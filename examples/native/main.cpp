// mmchat-native: a question about pictures, answered by an exported model with libtorch alone.
#include <c10/core/InferenceMode.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <set>
#include <string>
#include <vector>

#include "failure.h"
#include "model.h"
#include "prompt.h"

namespace {

constexpr char kHelp[] =
    "Usage: mmchat-native DIR --prompt TEXT [--image FILE]... [--max-new-tokens N]\n"
    "\n"
    "Answers by the model in DIR, which 'mmchat export --format aoti --dtype float32' wrote.\n"
    "The answer goes to stdout, token by token; it is the one of 'mmchat generate DIR' at\n"
    "temperature 0. Pictures are JPEG, PNG, BMP or GIF.\n"
    "\n"
    "  -p, --prompt TEXT         the question\n"
    "  -i, --image FILE          a picture; may be repeated\n"
    "  -n, --max-new-tokens N    longest answer, 1024 tokens if left out\n"
    "  -h, --help                show this and leave\n";

struct Question {
  std::string folder, prompt;
  std::vector<std::string> images;
  int64_t max_new_tokens = 1024;
};

int64_t positive(const std::string& option, const std::string& value) {
  char* end = nullptr;
  const long long found = std::strtoll(value.c_str(), &end, 10);
  if (value.empty() || *end || found < 1)
    throw Failure(kUsage, option + ": '" + value + "' is no number from 1");
  return found;
}

Question read_arguments(int count, char** arguments) {
  Question question;
  for (int i = 1; i < count; ++i) {
    std::string word = arguments[i], value;
    if (word == "-h" || word == "--help") {
      std::fputs(kHelp, stdout);
      std::exit(0);
    }
    if (word.rfind("-", 0) != 0) {
      if (!question.folder.empty())
        throw Failure(kUsage, "one folder is run, not both '" + question.folder + "' and '" + word +
                                  "'; quote a prompt of several words");
      question.folder = word;
      continue;
    }
    if (i + 1 == count) throw Failure(kUsage, "'" + word + "' needs a value; see --help");
    value = arguments[++i];
    if (word == "-p" || word == "--prompt")
      question.prompt = value;
    else if (word == "-i" || word == "--image")
      question.images.push_back(value);
    else if (word == "-n" || word == "--max-new-tokens")
      question.max_new_tokens = positive(word, value);
    else
      throw Failure(kUsage, "there is no option '" + word + "'; see --help");
  }
  if (question.folder.empty() || question.prompt.empty())
    throw Failure(kUsage, "a folder and --prompt are needed; see --help");
  return question;
}

void write_out(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  if (std::fflush(stdout)) throw Failure(kDisk, "the answer cannot be written");
}

void answer(const Question& question) {
  const c10::InferenceMode guard;
  Model model(question.folder);
  const ModelFacts& facts = model.facts();
  const Tokens tokens(question.folder + "/tokens.txt");
  const Prompt prompt = make_prompt(tokens, question.prompt, question.images.size(),
                                    facts.image_token_id, facts.is_chat);
  for (const std::string& path : question.images)
    model.see(cut_into_tiles(read_picture(path, facts.pictures.alpha_over_white), facts.pictures));
  std::set<int64_t> stops;
  for (const char* name : {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"})
    stops.insert(tokens.special(name));

  Utf8Stream stream(isatty(STDOUT_FILENO) != 0);
  std::string last = "\n";
  const auto show = [&](const std::string& text) {
    if (!text.empty()) write_out(last = text);
  };
  const auto room = facts.max_seq_len - static_cast<int64_t>(prompt.ids.size());
  int64_t id = model.prefill(prompt.ids, prompt.image_begin);
  for (int64_t left = std::min(question.max_new_tokens, room); !stops.count(id);) {
    if (!tokens.is_special(id)) show(stream.push(tokens.bytes(id)));
    if (--left == 0) break;
    id = model.decode(id);
  }
  show(stream.finish());
  if (last.back() != '\n') write_out("\n");
}

int report(const std::string& text, int code) {
  const std::string first = text.substr(0, text.find('\n'));  // libtorch adds a backtrace
  std::fprintf(stderr, "mmchat-native: error: %s\n", first.c_str());
  return code;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    answer(read_arguments(count, arguments));
    return 0;
  } catch (const Failure& failure) {
    return report(failure.what(), failure.code);
  } catch (const std::bad_alloc&) {
    return report("out of memory", kMemory);
  } catch (const std::exception& problem) {
    return report(problem.what(), kOther);
  }
}
