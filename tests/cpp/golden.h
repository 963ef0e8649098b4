// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// The bits every compiler and instruction set must give: FNV-1a over parameters and slots of all
// layouts after 20 steps, by golden_hash() in bits_test.cpp. A change here changes every user's
// numbers: it needs a reason and a line in the change log.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace fusestep::test {

inline const std::map<std::string, std::uint64_t> kGolden = {
    {"adam", 0xc49c9855ea8e61a7u},
    {"adam_beta1_zero", 0x6741e33671d2096u},
    {"adam_beta1_zero_maximize", 0x7e995ac31fa7533cu},
    {"adam_betas_small", 0x7e367754c1cba795u},
    {"adam_betas_small_maximize", 0xfdb6cbdf93fa9ab8u},
    {"adam_betas_zero", 0xf0d5c086b1017430u},
    {"adam_betas_zero_maximize", 0x1cf1d7b74ca08c2u},
    {"adam_eps", 0xf0b26c828afe9138u},
    {"adam_eps_maximize", 0xba5799bebc701c92u},
    {"adam_l2", 0xaeba467d3e46951bu},
    {"adam_l2_maximize", 0xd3cfb5c8cf9302d9u},
    {"adam_maximize", 0xaa6b366a927e8bdau},
    {"adamw", 0x6d700f757b48d3a7u},
    {"adamw_maximize", 0x32e0b63690333e76u},
    {"amsgrad", 0xfc97fd302c95d577u},
    {"amsgrad_l2", 0xd827dea181465f6bu},
    {"amsgrad_l2_maximize", 0xa9b32d6c4a07bf1u},
    {"amsgrad_maximize", 0x25f8c79bafdb4ed9u},
    {"amsgradw", 0x4f223c63492fda9cu},
    {"amsgradw_maximize", 0x6815321d22e56ddu},
    {"rmsprop", 0x66e1974a036b12d4u},
    {"rmsprop_both", 0x73c241f70085d0b5u},
    {"rmsprop_both_maximize", 0xad5542e06f30fceu},
    {"rmsprop_centered", 0x7f5431f2e1879eb4u},
    {"rmsprop_centered_maximize", 0xc30c0d29d44c3d7fu},
    {"rmsprop_l2", 0xdd9fd17d1c722b86u},
    {"rmsprop_l2_maximize", 0x281d708731f85c07u},
    {"rmsprop_maximize", 0x6506b7fdc9b51141u},
    {"rmsprop_momentum", 0xfa5565583bc5a77eu},
    {"rmsprop_momentum_maximize", 0x9947b0247d5e0a30u},
    {"sgd", 0xcf0b7a905d8ddf23u},
    {"sgd_dampening", 0xd7969e177b21f1cbu},
    {"sgd_dampening_l2", 0xb21a22a975d1a885u},
    {"sgd_dampening_l2_maximize", 0x1a11c397bd463e15u},
    {"sgd_dampening_maximize", 0x5e535f005817764fu},
    {"sgd_l2", 0x8c133ea8e3195830u},
    {"sgd_l2_maximize", 0x94af2a0c19581d23u},
    {"sgd_maximize", 0x58f3cfc0602b0ca2u},
    {"sgd_momentum", 0x3df87c4db3a37fa2u},
    {"sgd_momentum_maximize", 0x9640703a64030c70u},
    {"sgd_nesterov", 0x72f59cb8ed84b72fu},
    {"sgd_nesterov_l2", 0xf5444bd7afaa6483u},
    {"sgd_nesterov_l2_maximize", 0x3fc3708f52f900d3u},
    {"sgd_nesterov_maximize", 0xdba66f6edbc409ebu},
};

/// The same over further_layout_cases(), one setting per rule variant.
inline const std::map<std::string, std::uint64_t> kGoldenFurther = {
    {"adam", 0x5aba66225fcbb45fu},
    {"amsgrad", 0xfc1bc1c52fecbf76u},
    {"rmsprop", 0xad70d0b49efcd06bu},
    {"rmsprop_both", 0xeebcd22d5296df12u},
    {"rmsprop_centered", 0xf8995d7c4e2da215u},
    {"rmsprop_momentum", 0xa67e85c8168ef96fu},
    {"sgd", 0x835af79d34a808a1u},
    {"sgd_momentum", 0x8af67330befd235du},
};

}  // namespace fusestep::test
