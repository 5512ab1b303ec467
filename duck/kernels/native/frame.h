// The header of a data frame, as duck/wire.py describes it: where its fields lie.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

constexpr std::size_t kHeader = 32, kStamps = 16, kTag = 16;  // bytes; a tag follows what is sealed
constexpr std::size_t kKind = 3, kSession = 4, kTicket = 8, kLayer = 12, kSource = 14,
                      kFragment = 16, kFragments = 18, kBytes = 20, kOffset = 24, kCrc = 28;
constexpr std::uint8_t kAsk = 1, kAnswer = 2, kNack = 3;

template <typename T>
T field(const std::uint8_t* header, std::size_t offset) {
  T value;
  std::memcpy(&value, header + offset, sizeof value);
  return value;
}

template <typename T>
void set(std::uint8_t* header, std::size_t offset, T value) {
  std::memcpy(header + offset, &value, sizeof value);
}
