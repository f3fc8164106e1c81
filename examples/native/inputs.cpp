// What mmchat-native gives the model, to compare it with mmchat's own.
// mmchat-native-inputs DIR FILE...: the float32 values of the pictures' tiles, as bytes.
// Without files it reads texts from stdin, each ended by a zero byte, and prints a line of ids for each.
#include <cstdio>
#include <iostream>
#include <string>

#include "failure.h"
#include "folder.h"
#include "tokens.h"

int main(int count, char** arguments) {
  try {
    if (count < 2) throw Failure(kUsage, "give a folder, and pictures or texts on stdin");
    const std::string folder = arguments[1];
    if (count > 2) {
      const PictureRules rules = open_folder(folder).pictures;
      for (int i = 2; i < count; ++i) {
        const Picture picture = read_picture(arguments[i], rules.alpha_over_white);
        const Tiles tiles = cut_into_tiles(picture, rules);
        std::fwrite(tiles.values.data(), sizeof(float), tiles.values.size(), stdout);
      }
      return 0;
    }
    const Tokens tokens(folder + "/tokens.txt");
    for (std::string text; std::getline(std::cin, text, '\0');) {
      for (int64_t id : tokens.encode(text)) std::cout << id << ' ';
      std::cout << '\n';
    }
    return 0;
  } catch (const Failure& failure) {
    std::fprintf(stderr, "%s\n", failure.what());
    return failure.code;
  }
}
