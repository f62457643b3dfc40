//! A bounded cache for immutable things: index pages, frame maps, decoded cells.
//!
//! Sharded by key, replaced by second chance (CLOCK). Of several threads that miss the same key at
//! once one loads it and the others wait for it. Not a cache for anything that can change.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::Arc;

use parking_lot::Mutex;

const SHARDS: usize = 16;

/// Values by key, at most `limit` units of weight in all (one value may exceed its shard's part).
pub struct Cache<K, V> {
    shards: Vec<Mutex<Shard<K, V>>>,
    shard_limit: usize,
    hasher: RandomState,
}

struct Shard<K, V> {
    places: HashMap<K, usize>,
    ring: Vec<Option<Node<K, V>>>,
    free: Vec<usize>,
    hand: usize,
    weight: usize,
    /// One gate for each key that is being loaded.
    loading: HashMap<K, Arc<Mutex<()>>>,
}

struct Node<K, V> {
    key: K,
    value: Arc<V>,
    weight: usize,
    used: bool,
}

impl<K, V> fmt::Debug for Cache<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache")
            .field("shard_limit", &self.shard_limit)
            .finish_non_exhaustive()
    }
}

impl<K: Copy + Eq + Hash, V> Cache<K, V> {
    /// `limit` in the unit of the weights given to `get_or_load`.
    pub fn new(limit: usize) -> Self {
        let shard = || {
            Mutex::new(Shard {
                places: HashMap::new(),
                ring: Vec::new(),
                free: Vec::new(),
                hand: 0,
                weight: 0,
                loading: HashMap::new(),
            })
        };
        Self {
            shards: (0..SHARDS).map(|_| shard()).collect(),
            shard_limit: limit / SHARDS,
            hasher: RandomState::new(),
        }
    }

    /// The value if it is cached. Never loads, never waits for a load.
    pub fn get(&self, key: K) -> Option<Arc<V>> {
        self.shard(key).lock().get(key)
    }

    /// The value, loaded if it is not cached. `load` returns the value and its weight; an error is
    /// not remembered.
    pub fn get_or_load<E>(
        &self,
        key: K,
        load: impl FnOnce() -> Result<(V, usize), E>,
    ) -> Result<Arc<V>, E> {
        let shard = self.shard(key);
        let gate = {
            let mut shard = shard.lock();
            if let Some(value) = shard.get(key) {
                return Ok(value);
            }
            Arc::clone(shard.loading.entry(key).or_default())
        };
        let _turn = gate.lock();
        if let Some(value) = shard.lock().get(key) {
            return Ok(value);
        }
        let loaded = load();
        let mut shard = shard.lock();
        shard.loading.remove(&key);
        let (value, weight) = loaded?;
        let value = Arc::new(value);
        shard.insert(key, Arc::clone(&value), weight, self.shard_limit);
        Ok(value)
    }

    fn shard(&self, key: K) -> &Mutex<Shard<K, V>> {
        let hash = usize::try_from(self.hasher.hash_one(key) % SHARDS as u64);
        &self.shards[hash.expect("invariant: below SHARDS")]
    }

    #[cfg(test)]
    fn weight(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().weight).sum()
    }
}

impl<K: Copy + Eq + Hash, V> Shard<K, V> {
    fn get(&mut self, key: K) -> Option<Arc<V>> {
        let place = *self.places.get(&key)?;
        let node = self.ring[place].as_mut()?;
        node.used = true;
        Some(Arc::clone(&node.value))
    }

    fn insert(&mut self, key: K, value: Arc<V>, weight: usize, limit: usize) {
        if self.places.contains_key(&key) {
            return;
        }
        while self.weight + weight > limit && !self.places.is_empty() {
            self.evict_one();
        }
        let node = Some(Node {
            key,
            value,
            weight,
            used: false,
        });
        let place = if let Some(place) = self.free.pop() {
            self.ring[place] = node;
            place
        } else {
            self.ring.push(node);
            self.ring.len() - 1
        };
        self.places.insert(key, place);
        self.weight += weight;
    }

    fn evict_one(&mut self) {
        loop {
            let place = self.hand;
            self.hand = (self.hand + 1) % self.ring.len();
            match &mut self.ring[place] {
                Some(node) if node.used => node.used = false,
                Some(node) => {
                    self.weight -= node.weight;
                    self.places.remove(&node.key);
                    self.ring[place] = None;
                    self.free.push(place);
                    return;
                }
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use super::*;

    #[test]
    fn weight_stays_below_the_limit_and_used_values_stay() {
        let cache: Cache<u32, u32> = Cache::new(16 * 64);
        let load = |key: u32| cache.get_or_load::<()>(key, || Ok((key + 1, 8))).unwrap();
        for key in 0..10_000 {
            assert_eq!(*load(key), key + 1);
            // Key 0 is used all the time and is never the one to go.
            assert!(cache.get(0).is_some(), "after {key}");
        }
        assert!(cache.weight() <= 16 * 64);
        assert!(cache.get(1).is_none());
    }

    #[test]
    fn one_of_many_loads_and_an_error_is_not_remembered() {
        let cache: Cache<u32, u32> = Cache::new(1 << 20);
        assert_eq!(cache.get_or_load(7, || Err("bad")), Err("bad"));
        let loads = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    cache.get_or_load::<()>(7, || {
                        loads.fetch_add(1, Ordering::Relaxed);
                        thread::sleep(std::time::Duration::from_millis(20));
                        Ok((9, 1))
                    })
                });
            }
        });
        assert_eq!(loads.into_inner(), 1);
        assert_eq!(cache.get(7).as_deref(), Some(&9));
    }
}
