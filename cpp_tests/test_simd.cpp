// The inner loops of every instruction set that this processor has, against plain ones.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "cpu/simd.h"
#include "philox.h"
#include "tensors.h"

namespace spectralkv::test {
namespace {

using detail::SimdKernels;

std::vector<const SimdKernels*> all_tables() {
  const detail::SimdChoices choices = detail::simd_choices();
  return {choices.tables, choices.tables + choices.count};
}

class Simd : public ::testing::TestWithParam<const SimdKernels*> {
 protected:
  const SimdKernels& simd = *GetParam();
  Random random{1};

  std::vector<float> normals(Index count) {
    std::vector<float> values(at(count));
    for (float& value : values) value = static_cast<float>(random.normal());
    return values;
  }
};

constexpr std::initializer_list<DType> kFloats{DType::f32, DType::f16, DType::bf16};
constexpr float kLowest = -std::numeric_limits<float>::infinity();

TEST_P(Simd, LoadsEveryHalfAndBfloat) {
  std::vector<std::uint16_t> bits(1 << 16);
  std::iota(bits.begin(), bits.end(), std::uint16_t{0});
  std::vector<float> values(bits.size());
  for (const DType dtype : {DType::f16, DType::bf16}) {
    for (const Index first : {0, 65535}) {  // in vectors, and alone
      const Index count = 65536 - first;
      simd.load_row(bits.data() + first, dtype, count, values.data());
      for (Index i = 0; i < count; ++i) {
        const std::uint16_t word = bits[at(first + i)];
        const double expected = dtype == DType::f16 ? half_to_double(word) : bfloat_to_double(word);
        const auto value = static_cast<double>(values[at(i)]);
        ASSERT_TRUE(value == expected || (std::isnan(value) && std::isnan(expected)))
            << name_of(dtype) << " " << word << ": " << value << ", not " << expected;
        if (!std::isnan(value)) {
          ASSERT_EQ(std::signbit(value), std::signbit(expected)) << word;
        }
      }
    }
  }
}

TEST_P(Simd, LoadsRowsOfEveryLength) {
  for (const DType dtype : kFloats) {
    for (Index n = 0; n < 70; ++n) {
      HostTensor source(dtype, {n + 1});
      source.fill_normal(random);
      std::vector<float> values(at(n) + 1, 7.0F);
      simd.load_row(source.view().data, dtype, n, values.data());
      for (Index i = 0; i < n; ++i) {
        ASSERT_EQ(static_cast<double>(values[at(i)]), source.get({i}));
      }
      EXPECT_EQ(values.back(), 7.0F) << "wrote behind the end";
    }
  }
}

TEST_P(Simd, MultipliesKeysAndQueries) {
  for (const DType dtype : kFloats) {
    for (const Index dim : {1, 4, 7, 16, 33, 64, 100}) {
      for (const Index n : {1, 2, 5, 8, 15, 16, 17, 40}) {
        for (const Index num_queries : {1, 2, 3, 4, 5, 7, 16}) {
          HostTensor keys(dtype, {n, dim}, {}, 3);
          keys.fill_normal(random);
          const std::vector<float> queries = normals(num_queries * dim);
          const Index ld = n + 2;
          std::vector<float> out(at(num_queries * ld), 7.0F);
          simd.dot_keys(keys.view().data, dtype, dim + 3, n, dim, queries.data(), num_queries,
                        out.data(), ld);
          for (Index g = 0; g < num_queries; ++g) {
            for (Index j = 0; j < n; ++j) {
              double expected = 0.0;
              for (Index d = 0; d < dim; ++d) {
                expected += keys.get({j, d}) * static_cast<double>(queries[at(g * dim + d)]);
              }
              ASSERT_NEAR(static_cast<double>(out[at(g * ld + j)]), expected, 2e-5);
            }
            EXPECT_EQ(out[at(g * ld + n)], 7.0F) << "wrote behind the end";
          }
        }
      }
    }
  }
}

TEST_P(Simd, GivesEqualKeysEqualScores) {
  // Ties are broken by the slot, so the place of a key in a block must not change its score.
  const Index dim = 37;
  const std::vector<float> key = normals(dim);
  const std::vector<float> queries = normals(7 * dim);
  std::vector<float> keys;
  for (int j = 0; j < 41; ++j) keys.insert(keys.end(), key.begin(), key.end());
  for (const Index num_queries : {1, 2, 3, 4, 7}) {
    std::vector<float> out(at(num_queries * 41));
    simd.dot_keys(keys.data(), DType::f32, dim, 41, dim, queries.data(), num_queries, out.data(),
                  41);
    for (Index g = 0; g < num_queries; ++g) {
      for (Index j = 1; j < 41; ++j) ASSERT_EQ(out[at(g * 41 + j)], out[at(g * 41)]);
    }
  }
}

TEST_P(Simd, MultipliesPanels) {
  const Index width = simd.panel_width;
  for (const DType dtype : kFloats) {
    for (const Index dim : {1, 3, 64, 65}) {
      for (Index n = 1; n <= width; n += 3) {
        HostTensor keys(dtype, {n, dim}, {}, 1);
        keys.fill_normal(random);
        std::vector<float> panel(at(width * dim), 7.0F);
        simd.pack_panel(keys.view().data, dtype, dim + 1, n, dim, panel.data());
        for (Index d = 0; d < dim; ++d) {
          for (Index j = 0; j < width; ++j) {
            ASSERT_EQ(static_cast<double>(panel[at(d * width + j)]),
                      j < n ? keys.get({j, d}) : 0.0);
          }
        }
        for (const Index num_rows : {1, 3, 4, 8, 9, 21}) {
          const std::vector<float> rows = normals(num_rows * dim);
          std::vector<float> out(at(num_rows * (width + 1)), 7.0F);
          simd.panel_scores(panel.data(), dim, rows.data(), num_rows, out.data(), width + 1);
          for (Index r = 0; r < num_rows; ++r) {
            for (Index j = 0; j < n; ++j) {
              double expected = 0.0;
              for (Index d = 0; d < dim; ++d) {
                expected += keys.get({j, d}) * static_cast<double>(rows[at(r * dim + d)]);
              }
              ASSERT_NEAR(static_cast<double>(out[at(r * (width + 1) + j)]), expected, 2e-5);
            }
            EXPECT_EQ(out[at(r * (width + 1) + width)], 7.0F) << "wrote behind the panel";
          }
        }
      }
    }
  }
}

TEST_P(Simd, MasksScores) {
  for (Index n = 0; n < 70; ++n) {
    std::vector<float> scores = normals(n + 1);
    std::vector<std::int32_t> positions(at(n) + 1, 3);
    for (Index j = 0; j < n; ++j) {
      switch (random.integer(0, 9)) {
        case 0:
          scores[at(j)] = std::numeric_limits<float>::quiet_NaN();
          break;
        case 1:
          scores[at(j)] = random.chance(0.5) ? kLowest : -kLowest;
          break;
        case 2:
          scores[at(j)] = 3e38F;  // infinite once it is scaled
          break;
        case 3:
          positions[at(j)] = -1;
          break;
        case 4:
          positions[at(j)] = 0;
          break;
        default:
          break;
      }
    }
    for (const bool with_positions : {true, false}) {
      std::vector<float> masked = scores;
      float highest = kLowest;
      const float maximum =
          simd.mask_scores(masked.data(), n, 2.5F, with_positions ? positions.data() : nullptr);
      for (Index j = 0; j < n; ++j) {
        const float scaled = scores[at(j)] * 2.5F;
        const bool out = !std::isfinite(scaled) || (with_positions && positions[at(j)] < 0);
        ASSERT_EQ(masked[at(j)], out ? kLowest : scaled) << j;
        highest = std::max(highest, masked[at(j)]);
      }
      EXPECT_EQ(maximum, highest);
      EXPECT_EQ(masked.back(), scores.back());
    }
  }
}

TEST_P(Simd, SumsExponentials) {
  for (Index n = 1; n < 70; ++n) {
    std::vector<float> scores;
    for (Index j = 0; j < n; ++j) {
      scores.push_back(static_cast<float>(-100.0 * random.uniform() * random.uniform()));
    }
    scores[at(random.integer(0, n - 1))] = 0.0F;
    if (n > 3) scores[at(n / 2)] = kLowest;
    if (n > 5) scores[at(n / 3)] = -1e30F;
    const float maximum = *std::max_element(scores.begin(), scores.end());
    std::vector<float> values = scores;
    values.push_back(7.0F);
    const auto sum = static_cast<double>(simd.exp_sum(values.data(), n, maximum));
    double expected_sum = 0.0;
    for (Index j = 0; j < n; ++j) {
      const auto x = static_cast<double>(scores[at(j)] - maximum);
      const double expected = std::exp(x);
      expected_sum += expected;
      const auto value = static_cast<double>(values[at(j)]);
      if (x < -88.0) {
        ASSERT_LE(value, 1e-37);
      } else {
        ASSERT_NEAR(value, expected, 1e-36 + 2e-7 * expected) << x;
      }
    }
    EXPECT_NEAR(sum, expected_sum, 1e-6 * expected_sum);
    EXPECT_EQ(values.back(), 7.0F);
  }
}

TEST_P(Simd, AddsScaled) {
  for (Index n = 0; n < 70; ++n) {
    const std::vector<float> x = normals(n + 1);
    std::vector<float> sum = normals(n + 1);
    const std::vector<float> before = sum;
    simd.add_scaled(sum.data(), x.data(), n, 0.3F);
    for (Index j = 0; j < n; ++j) {
      ASSERT_NEAR(static_cast<double>(sum[at(j)]),
                  static_cast<double>(before[at(j)]) + static_cast<double>(0.3F * x[at(j)]), 1e-6);
    }
    EXPECT_EQ(sum.back(), before.back());
  }
}

TEST_P(Simd, AddsWeightedRows) {
  for (const DType dtype : kFloats) {
    for (const Index dim : {1, 7, 16, 33, 128, 300}) {
      for (const Index n : {0, 1, 7, 8, 9, 40}) {
        for (const Index count : {1, 3, 4, 6}) {
          HostTensor rows(dtype, {n, dim}, {}, 3);
          rows.fill_normal(random);
          std::vector<std::int32_t> positions(at(n));
          for (Index j = 0; j < n; ++j) {
            positions[at(j)] = random.chance(0.3) ? -1 : static_cast<std::int32_t>(j);
            if (positions[at(j)] < 0) rows.set({j, 0}, kNan);  // nobody may read it
          }
          const std::vector<float> weights = normals(count * (n + 2));
          const bool marked = random.chance(0.7);
          if (!marked) rows.fill_normal(random);
          std::vector<float> sums = normals(count * dim + 1);
          const std::vector<float> before = sums;
          simd.add_weighted_rows(rows.view().data, dtype, dim + 3, n, dim,
                                 marked ? positions.data() : nullptr, weights.data(), n + 2, count,
                                 sums.data());
          for (Index g = 0; g < count; ++g) {
            for (Index d = 0; d < dim; ++d) {
              auto expected = static_cast<double>(before[at(g * dim + d)]);
              for (Index j = 0; j < n; ++j) {
                if (marked && positions[at(j)] < 0) continue;
                expected += static_cast<double>(weights[at(g * (n + 2) + j)]) * rows.get({j, d});
              }
              ASSERT_NEAR(static_cast<double>(sums[at(g * dim + d)]), expected, 1e-4);
            }
          }
          EXPECT_EQ(sums.back(), before.back()) << "wrote behind the end";
        }
      }
    }
  }
}

TEST_P(Simd, FindsTheBest) {
  for (int round = 0; round < 300; ++round) {
    const Index n = random.integer(0, 200);
    std::vector<float> values = normals(n);
    std::vector<std::int32_t> positions(at(n));
    for (Index j = 0; j < n; ++j) {
      if (random.chance(0.3)) values[at(j)] = std::round(values[at(j)]);  // many are equal
      positions[at(j)] = static_cast<std::int32_t>(random.integer(-1, 20));
    }
    const Index self = n == 0 ? 0 : random.integer(0, n - 1);
    for (const int k : {1, 4, 8, 16, 32}) {
      std::vector<std::int32_t> expected;
      for (Index j = 0; j < n; ++j) {
        if (values[at(j)] > 0.0F && j != self && positions[at(j)] >= 4) {
          expected.push_back(static_cast<std::int32_t>(j));
        }
      }
      std::stable_sort(expected.begin(), expected.end(), [&](std::int32_t a, std::int32_t b) {
        return values[at(a)] > values[at(b)];
      });
      expected.resize(std::min(expected.size(), at(k)));
      std::vector<std::int32_t> indices(at(k), -7);
      std::vector<float> best(at(k));
      const int count =
          simd.top_k(values.data(), n, k, positions.data(), 4, self, indices.data(), best.data());
      ASSERT_EQ(at(count), expected.size());
      indices.resize(at(count));
      ASSERT_EQ(indices, expected);
      for (int i = 0; i < count; ++i) ASSERT_EQ(best[at(i)], values[at(indices[at(i)])]);
    }
  }
}

TEST_P(Simd, SumsDirections) {
  for (const DType dtype : kFloats) {
    for (const Index dim : {1, 5, 16, 67}) {
      const Index n = 23;
      HostTensor keys(dtype, {n, dim}, {}, 2);
      keys.fill_normal(random);
      keys.set({3, dim / 2}, kNan);
      keys.set({4, 0}, kInfinity);
      keys.set({5, dim - 1}, -kInfinity);
      for (Index d = 0; d < dim; ++d) keys.set({6, d}, 0.0);
      std::vector<std::int32_t> positions(at(n), 9);
      positions[7] = -1;
      std::vector<float> sum(at(dim) + 1, 0.0F);
      std::vector<float> inverse(at(n) + 1, 7.0F);
      simd.sum_directions(keys.view().data, dtype, dim + 2, n, dim, positions.data(), sum.data(),
                          inverse.data());
      std::vector<double> expected(at(dim), 0.0);
      for (Index j = 0; j < n; ++j) {
        if ((j >= 3 && j <= 5) || j == 7) {
          EXPECT_EQ(inverse[at(j)], -1.0F) << j;
          continue;
        }
        const std::vector<double> key = keys.vector({j});
        const double norm = std::sqrt(std::inner_product(key.begin(), key.end(), key.begin(), 0.0));
        const double factor = norm > 0.0 ? 1.0 / norm : 0.0;
        EXPECT_NEAR(static_cast<double>(inverse[at(j)]), factor, 1e-5 * factor) << j;
        for (Index d = 0; d < dim; ++d) expected[at(d)] += factor * key[at(d)];
      }
      for (Index d = 0; d < dim; ++d) {
        ASSERT_NEAR(static_cast<double>(sum[at(d)]), expected[at(d)], 1e-5);
      }
      EXPECT_EQ(sum.back(), 0.0F);
      EXPECT_EQ(inverse.back(), 7.0F);
    }
  }
}

TEST_P(Simd, DrawsThePhiloxNumbers) {
  constexpr std::uint64_t kLarge = 0xfedcba9876543210U;
  for (const std::uint64_t seed : {std::uint64_t{0}, std::uint64_t{42}, kLarge}) {
    // Counters that carry into their high words, too.
    for (const std::uint64_t subsequence : {std::uint64_t{0}, std::uint64_t{0xfffffff8U}, kLarge}) {
      for (const std::uint64_t first_block :
           {std::uint64_t{0}, std::uint64_t{0xfffffffeU}, kLarge}) {
        std::vector<std::uint32_t> words(5 * 4 * detail::kWalkerLanes);
        simd.philox_lanes(seed, subsequence, first_block, 5, words.data());
        for (std::uint64_t block = 0; block < 5; ++block) {
          for (std::uint64_t lane = 0; lane < detail::kWalkerLanes; ++lane) {
            const detail::PhiloxBlock expected =
                detail::philox4x32_10(seed, subsequence + lane, first_block + block);
            for (std::size_t i = 0; i < 4; ++i) {
              ASSERT_EQ(words[(4 * block + i) * detail::kWalkerLanes + lane], expected[i]);
            }
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(EveryInstructionSet, Simd, ::testing::ValuesIn(all_tables()),
                         [](const auto& table) { return std::string(table.param->name); });

}  // namespace
}  // namespace spectralkv::test
