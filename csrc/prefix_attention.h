// What a call of prefix_attention is cut into, on the host, before any arithmetic.
//
// The query rows of one run (neighbouring segments that share a prefix) and one key head are stacked, the query heads
// of a token side by side, and cut into blocks of kLanes rows. A block's rows are the lanes of vectors throughout:
// scores are kept transposed (key, lane), so that a key row is read as it lies in memory, whatever its stride, and the
// softmax needs no sum across lanes. Keys are cut into tiles of kTile from the start of their interval. What happens in
// a lane depends on its own row and keys alone: shared, packed, alone and decoded give the same bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace cosmo_fast::prefix_attention {

constexpr int64_t kTile = 64;      // keys
constexpr int64_t kStrip = 8;      // blocks whose queries and gradients stay in the second-level cache together
constexpr int64_t kMostParts = 8;  // a run's backward is cut into as many, each with its own sums of dK and dV

// The rows of one segment in one block: lanes [begin, end) are its stacked rows row, row + 1, …
struct Piece {
  int64_t block, segment, begin, end, row;
  int64_t token, keys, seen;  // first query and own key row; own keys that the segment's first token sees
  int64_t sums;               // backward: where the part keeps the gradients of the segment's own keys
  int64_t limit(int64_t lane, int64_t rep) const { return seen + (row + lane - begin) / rep; }
};

struct Block {
  int64_t lanes, first_piece, last_piece, prefix, prefix_length, part;
};

// Consecutive blocks of a run: one thread's work in the backward. Its sums of dK and dV lie at `sums`, prefix first.
struct Part {
  int64_t first_block, last_block, sums;
};

// Key rows [row, row + length) have a part of their gradient at `sums`.
struct Share {
  int64_t row, length, sums;
};

struct Plan {
  std::vector<Piece> pieces;
  std::vector<Block> blocks;
  std::vector<Part> parts;
  std::vector<Share> shares;
  int64_t sums = 0;  // key rows of all parts

  // table: (s, 6) q_start, q_length, k_start, k_length, prefix_start, prefix_length.
  // A segment's first lane in a block is a multiple of `align`.
  Plan(const int64_t* table, int64_t segments, int64_t rep, int64_t lanes, int64_t align = 1) : align(align) {
    for (int64_t s = 0; s < segments;) {
      const int64_t *head = table + 6 * s, first = s;
      int64_t rows = head[1] * rep;
      for (++s; head[5] > 0 && s < segments && table[6 * s + 4] == head[4] && table[6 * s + 5] == head[5]; ++s) {
        rows += table[6 * s + 1] * rep;
      }
      if (rows > 0) add_run(table, first, s, rows, rep, lanes);
    }
  }

 private:
  int64_t align;

  void add_run(const int64_t* table, int64_t first, int64_t last, int64_t rows, int64_t rep, int64_t lanes) {
    const int64_t first_block = int64_t(blocks.size()), prefix = table[6 * first + 4], length = table[6 * first + 5];
    int64_t used = lanes;
    for (int64_t s = first; s < last; ++s) {
      const int64_t* x = table + 6 * s;
      used = (used + align - 1) / align * align;
      for (int64_t row = 0; row < x[1] * rep;) {
        if (used == lanes) {
          if (int64_t(blocks.size()) > first_block) blocks.back().lanes = used;
          blocks.push_back({0, int64_t(pieces.size()), 0, prefix, length, 0});
          used = 0;
        }
        const int64_t n = std::min(lanes - used, x[1] * rep - row);
        pieces.push_back({int64_t(blocks.size()) - 1, s, used, used + n, row, x[0], x[2], x[3] - x[1] + 1, 0});
        blocks.back().last_piece = int64_t(pieces.size());
        used += n;
        row += n;
      }
    }
    blocks.back().lanes = used;
    const int64_t count = int64_t(blocks.size()) - first_block;
    const int64_t each = std::max(kStrip, (count + kMostParts - 1) / kMostParts);
    for (int64_t b = first_block; b < first_block + count; b += each) {
      add_part(b, std::min(b + each, first_block + count), rep);
    }
  }

  void add_part(int64_t first_block, int64_t last_block, int64_t rep) {
    parts.push_back({first_block, last_block, sums});
    for (int64_t b = first_block; b < last_block; ++b) blocks[b].part = int64_t(parts.size()) - 1;
    const Block& block = blocks[first_block];
    if (block.prefix_length > 0) add_share(block.prefix, block.prefix_length);
    const int64_t end = blocks[last_block - 1].last_piece;
    for (int64_t i = block.first_piece; i < end; ++i) {
      Piece& piece = pieces[i];
      if (i == block.first_piece || piece.segment != pieces[i - 1].segment) {
        add_share(piece.keys, 0);
      }
      Share& share = shares.back();
      const int64_t length = piece.limit(piece.end - 1, rep);
      sums += length - share.length;
      share.length = length;
      piece.sums = share.sums;
    }
  }

  void add_share(int64_t row, int64_t length) {
    shares.push_back({row, length, sums});
    sums += length;
  }
};

}  // namespace cosmo_fast::prefix_attention
