//! Pages that are touched for the first time, one after the other in random order: by an accelerator's lane, which resolves
//! its faults itself, or by the CPU, whose faults come by signal. No fault has to wait for another thread, on either side.

use super::{accelerator, region, run, send, space, warm};
use crate::contender::Contender;
use crate::error::Trouble;
use crate::spec::{Found, Metric, Sample, Spec, Work};
use crate::workload::{self, PAGE_BYTES, PAGE_WORDS, Places};
use peerspace::device::soft::{Accelerator, KernelError, Lane};
use peerspace::{DeviceId, Hint, Node, Region, Space};
use std::hint::black_box;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Of so many pages one is touched: a fault next to another one would look like a stream, and bring in more.
const APART: u32 = 4;
/// Of so many pages, all but one must have been fetched by a fault of their own.
const STRAY: u64 = 32;

/// Who touches, and what.
pub(in crate::contender) struct Touch {
    space: Space,
    accelerator: Accelerator,
    /// Memory alone, and the accelerator.
    ids: [DeviceId; 2],
    bytes: u64,
    device: bool,
    on: Found,
}

impl Touch {
    pub(in crate::contender) fn new(spec: &Spec, device: bool, on: Found) -> Result<Touch, Trouble> {
        let accelerator = accelerator(spec.data, None)?;
        let (space, ids) = space(spec, std::slice::from_ref(&accelerator))?;
        let ids = [ids[0], ids[1]];
        warm(&space, ids[1], spec.data)?;
        Ok(Touch { space, accelerator, ids, bytes: spec.data, device, on })
    }

    /// A region whose pages are what they have to be, in blocks that are split already; and those to be touched, in order.
    fn prepare(&self) -> Result<(Region, Vec<u32>), Trouble> {
        let mut region = region(&self.space, self.bytes, Hint::Sparse)?;
        let (all, pages) = (region.len(), (region.len() / PAGE_BYTES) as u64);
        if self.on != Found::Zeros {
            workload::fill(region.typed_mut(), 0);
        }
        match self.on {
            Found::Zeros => {}
            Found::Stored => {
                let stored = region.migrate_to(0..all, self.ids[0]).map_err(Trouble::failed("migrate"))?;
                if stored != all {
                    return Err(Trouble::Failed(format!("only {stored} of {all} bytes were stored")));
                }
            }
            Found::Mapped if self.device => {}
            Found::Mapped => send(&region, 0..all, Node::Device(self.ids[1]))?,
        }
        // The first page of each block is the CPU's.
        for block in region.typed_mut::<u64>().chunks_exact_mut(super::BLOCK / 8) {
            black_box(&mut block[PAGE_WORDS - 1]);
            block[PAGE_WORDS - 1] = 0;
        }
        let mut order = Places::new(pages).shuffled();
        order.retain(|page| *page % APART == APART / 2);
        Ok((region, order))
    }

    /// Faults of either kind so far, those that count.
    fn faults(&self) -> u64 {
        let s = self.space.statistics();
        let mmu = s.devices.iter().find_map(|d| d.mmu).unwrap_or_default();
        match (self.device, self.on) {
            (true, _) => mmu.moved,
            (false, Found::Zeros) => s.faults.zero_fill,
            (false, Found::Stored | Found::Mapped) => s.faults.device,
        }
    }
}

/// Touches by the CPU. The result: nanoseconds for each.
fn by_cpu(region: &mut Region, order: &[u32], writes: bool) -> Result<Vec<u32>, Trouble> {
    let mut took = Vec::with_capacity(order.len());
    let words = region.typed_mut::<u64>();
    for page in order {
        let (page, k) = place(*page);
        let i = page * PAGE_WORDS + k;
        let start = Instant::now();
        if writes {
            black_box(&mut *words)[i] = workload::word(i);
            black_box(&mut *words);
        } else {
            let found = black_box(&*words)[i];
            black_box(found);
        }
        took.push(start.elapsed().as_nanos() as u32);
        workload::check(page, k, words[i])?;
        if writes && words[i + 1] != 0 {
            return Err(Trouble::Wrong(format!("word {} of memory never touched is {:#x}", i + 1, words[i + 1])));
        }
    }
    Ok(took)
}

/// The same by a lane of `on`.
fn by_device(on: &Accelerator, region: &Region, order: &[u32], writes: bool) -> Result<Vec<u32>, Trouble> {
    let base = region.as_ptr() as u64;
    let (order, took) = (order.to_vec(), Arc::new(Mutex::new(Vec::with_capacity(order.len()))));
    let kernel = {
        let took = took.clone();
        move |lane: &Lane| -> Result<(), KernelError> {
            let mut took = took.lock().unwrap_or_else(PoisonError::into_inner);
            for page in &order {
                let (page, k) = place(*page);
                let i = page * PAGE_WORDS + k;
                let at = base + 8 * i as u64;
                let start = Instant::now();
                if writes {
                    lane.store(at, workload::word(i))?;
                } else {
                    black_box(lane.load::<u64>(at)?);
                }
                took.push(start.elapsed().as_nanos() as u32);
                let (found, next) = (lane.load::<u64>(at)?, lane.load::<u64>(at + 8)?);
                assert!(found == workload::word(i), "{}word {i} is {found:#x}", super::WRONG);
                assert!(!writes || next == 0, "{}memory never touched is {next:#x}", super::WRONG);
            }
            Ok(())
        }
    };
    run(on, kernel)?;
    let mut took = took.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(std::mem::take(&mut *took))
}

/// The page, and the word of it that is touched: one that is not zero, and has one behind it in the same page.
fn place(page: u32) -> (usize, usize) {
    (page as usize, page as usize % (PAGE_WORDS / 4))
}

impl Contender for Touch {
    fn perform(&mut self, _: Work) -> Result<Sample, Trouble> {
        let (mut region, order) = self.prepare()?;
        let before = self.faults();
        let writes = self.on == Found::Zeros;
        let mut took = match self.device {
            true => by_device(&self.accelerator, &region, &order, writes)?,
            false => by_cpu(&mut region, &order, writes)?,
        };
        let (faults, touched) = (self.faults() - before, took.len() as u64);
        if faults < touched - touched / STRAY || faults > touched + touched / STRAY {
            return Err(Trouble::Failed(format!("{touched} pages were touched, and {faults} came by faults")));
        }
        let mean = took.iter().map(|ns| f64::from(*ns)).sum::<f64>() / touched as f64;
        let half = took.len() / 2;
        let (_, median, _) = took.select_nth_unstable(half);
        Ok(Sample::verified(touched).with(Metric::PerFault, mean / 1e3).with(Metric::FaultMedian, f64::from(*median)))
    }
}
