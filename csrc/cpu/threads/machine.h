// SPDX-License-Identifier: Apache-2.0
// What the operating system tells about the machine: cores that we may use, who else runs, how often a thread was put
// aside.
#pragma once

#include <cstdint>

namespace fusedrnn::cpu {

// Cores that this process may use: those of its affinity, and not more than a container's quota has whole ones.
int processors();

// Tasks that run or would like to, in the whole machine, beyond its cores; 0 where the system does not tell,
// and where this process may use some of the cores only.
int tasks_without_a_core();

// How often the calling thread lost its core though it wanted to go on; 0 where the system does not tell.
int64_t times_put_aside();

int64_t nanoseconds();  // of a clock that only goes forward

// Sleeps while *word == seen, until wake_all(word), or for about `limit` nanoseconds. May return early.
void sleep_on(const uint32_t* word, uint32_t seen, int64_t limit);
void wake_all(const uint32_t* word);

// The calling thread's way to round, and to treat tiny numbers.
uint64_t float_mode();
void set_float_mode(uint64_t mode);

}  // namespace fusedrnn::cpu
