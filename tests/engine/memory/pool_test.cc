// SPDX-License-Identifier: Apache-2.0
#include <set>

#include "engine/memory/page_pool.h"
#include "engine/memory/slot_pool.h"
#include "gtest/gtest.h"

namespace bebop {
namespace {

TEST(PagePool, HandsOutEachPageOnceUntilNoneIsLeft) {
  PagePool pool(5);
  std::set<int32_t> pages;
  for (int i = 0; i < 5; ++i) {
    const int32_t page = pool.Allocate();
    EXPECT_TRUE(page >= 0 && page < 5);
    EXPECT_TRUE(pages.insert(page).second);
    EXPECT_EQ(pool.num_references(page), 1);
    EXPECT_EQ(pool.num_free(), 4 - i);
  }
  EXPECT_EQ(pool.Allocate(), -1);
  EXPECT_EQ(pool.num_used(), 5);
}

TEST(PagePool, SharedPageIsFreeOnlyAfterItsLastRelease) {
  PagePool pool(2);
  const int32_t page = pool.Allocate();
  pool.AddReference(page);
  pool.AddReference(page);
  EXPECT_EQ(pool.num_references(page), 3);
  EXPECT_FALSE(pool.Release(page));
  EXPECT_FALSE(pool.Release(page));
  EXPECT_EQ(pool.num_free(), 1);
  EXPECT_TRUE(pool.Release(page));
  EXPECT_EQ(pool.num_free(), 2);
  EXPECT_EQ(pool.num_references(page), 0);
  EXPECT_EQ(pool.Allocate(), page) << "the page released last is the next";
}

TEST(PagePoolDeathTest, MisuseAborts) {
  PagePool pool(2);
  const int32_t page = pool.Allocate();
  EXPECT_DEATH(pool.AddReference(1 - page), "CHECK failed");
  EXPECT_DEATH(pool.Release(2), "CHECK failed");
  EXPECT_DEATH(pool.Release(-1), "CHECK failed");
  pool.Release(page);
  EXPECT_DEATH(pool.Release(page), "CHECK failed");
}

TEST(PagePool, EmptyPoolIsEmpty) {
  PagePool pool(0);
  EXPECT_EQ(pool.Allocate(), -1);
  EXPECT_EQ(pool.num_pages(), 0);
}

TEST(SlotPool, HandsOutEachSlotOnce) {
  SlotPool pool(3);
  const int32_t a = pool.Allocate(), b = pool.Allocate(), c = pool.Allocate();
  EXPECT_EQ((std::set<int32_t>{a, b, c}), (std::set<int32_t>{0, 1, 2}));
  EXPECT_EQ(pool.Allocate(), -1);
  pool.Release(b);
  EXPECT_FALSE(pool.in_use(b));
  EXPECT_TRUE(pool.in_use(a));
  EXPECT_EQ(pool.num_used(), 2);
  EXPECT_EQ(pool.Allocate(), b);
}

TEST(SlotPoolDeathTest, MisuseAborts) {
  SlotPool pool(1);
  EXPECT_DEATH(pool.Release(0), "CHECK failed");
  EXPECT_DEATH(pool.in_use(1), "CHECK failed");
}

}  // namespace
}  // namespace bebop
