//! A breadth-first search by two accelerators at once, over a graph that the CPU has built with ordinary vectors and pointers.
//!
//! ```text
//! cargo run --release -p peerspace --example bfs [-- --vertices N]
//! ```
//!
//! The program's allocator is a managed heap, so every vector of some size can be used by the devices as it is: nothing is
//! copied, translated or registered. One device can hold half of the graph, the other an eighth, and the host's RAM half. In each
//! level both expand a part of the frontier; whoever is the first to set the level of a vertex has found it.
//!
//! What one does for it:
//! - A kernel gets addresses, and reads and writes by its `Lane`. What it reads of a structure is at `offset_of!` its fields.
//! - What only readers share is copied to each device (`Mode::Replicate`) and stays there. What is written had better lie
//!   elsewhere: so the levels are not in the vertices, but in a vector of their own.
//! - Atomic accesses take a page to the device that makes them. So few are made: it is looked first whether a level is set,
//!   and what a run of items has found is put into the queue at once.

use peerspace::device::compressed::Compressed;
use peerspace::device::mmu::Mode;
use peerspace::device::soft::{Accelerator, KernelError, Lane, Options};
use peerspace::{Faults, Heap};
use std::error::Error;
use std::mem::offset_of;
use std::ops::Range;
use std::sync::OnceLock;

/// The devices are made when the heap is, at the first large allocation.
static DEVICES: OnceLock<[Accelerator; 2]> = OnceLock::new();

#[global_allocator]
static HEAP: Heap = Heap::new(0).from(Heap::LEAST).faults(Faults::Auto).prepare(|builder| {
    let graph = vertices().unwrap_or(1000) * 64;
    let device = |name: &str, bytes: u64| {
        let options = Options::new(bytes.max(64 << 10)).name(name).mode(Mode::Replicate);
        Accelerator::new(options).expect("address space")
    };
    let devices = DEVICES.get_or_init(|| [device("large", graph / 2), device("small", graph / 8)]);
    let rest = Compressed::new(4 * graph + (16 << 20)).expect("address space");
    let host = (graph / 2).max(4 << 20);
    devices.iter().fold(builder.host(host).device(rest), |builder, device| builder.device(device.clone()))
});

const UNSEEN: u32 = u32::MAX;

/// A vertex, as the CPU and the devices see it.
#[repr(C)]
struct Vertex {
    /// So many pointers to vertices.
    edges: *const *const Vertex,
    degree: u64,
}

struct Graph {
    vertices: Vec<Vertex>,
    /// What the vertices point to.
    edges: Vec<*const Vertex>,
}

impl Graph {
    /// A graph in which most edges lead to somewhere near, and some far away.
    fn random(count: usize) -> Graph {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 16) as usize % below
        };
        let mut vertices: Vec<Vertex> = Vec::with_capacity(count);
        let first = vertices.as_ptr();
        let mut edges: Vec<*const Vertex> = Vec::with_capacity(count * 8);
        for i in 0..count {
            let degree = 1 + random(8);
            // Both vectors stay where they are: they have room for all.
            vertices.push(Vertex { edges: edges.as_ptr().wrapping_add(edges.len()), degree: degree as u64 });
            for _ in 0..degree {
                let to = if random(200) == 0 { random(count) } else { (i + random(1000)) % count };
                edges.push(first.wrapping_add(to));
            }
        }
        Graph { vertices, edges }
    }

    /// The levels, by the CPU alone.
    fn search(&self) -> Vec<u32> {
        let first = self.vertices.as_ptr();
        let index = |vertex: *const Vertex| (vertex.addr() - first.addr()) / size_of::<Vertex>();
        let mut levels = vec![UNSEEN; self.vertices.len()];
        levels[0] = 0;
        let mut queue = std::collections::VecDeque::from([0]);
        while let Some(at) = queue.pop_front() {
            let Vertex { edges, degree } = self.vertices[at];
            // SAFETY: a vertex points to so many edges of the graph.
            for to in unsafe { std::slice::from_raw_parts(edges, degree as usize) } {
                let to = index(*to);
                if levels[to] == UNSEEN {
                    levels[to] = levels[at] + 1;
                    queue.push_back(to);
                }
            }
        }
        levels
    }
}

/// What a kernel needs for a level: addresses of the program's.
#[derive(Clone, Copy)]
struct Step {
    vertices: u64,
    levels: u64,
    /// The level of what is found.
    level: u32,
    /// Pointers to the vertices of the level before.
    frontier: u64,
    /// How many were found, and pointers to them.
    found: u64,
}

/// The kernel: expands the vertices `items` of the frontier.
fn expand(lane: &Lane, items: Range<u64>, step: Step) -> Result<(), KernelError> {
    let mut found: Vec<u64> = Vec::new();
    for item in items {
        let vertex: u64 = lane.load(step.frontier + 8 * item)?;
        let edges: u64 = lane.load(vertex + offset_of!(Vertex, edges) as u64)?;
        let degree: u64 = lane.load(vertex + offset_of!(Vertex, degree) as u64)?;
        for edge in 0..degree {
            let to: u64 = lane.load(edges + 8 * edge)?;
            let level = step.levels + (to - step.vertices) / size_of::<Vertex>() as u64 * 4;
            if lane.load::<u32>(level)? == UNSEEN && lane.compare_exchange(level, UNSEEN, step.level)?.is_ok() {
                found.push(to);
            }
        }
    }
    let at = lane.fetch_add(step.found, found.len() as u64)?;
    lane.write(step.found + 8 + 8 * at, bytemuck::cast_slice(&found))
}

/// The levels, by the devices: level after level, each device with its part of the frontier.
fn search(graph: &Graph, devices: &[Accelerator; 2]) -> Result<Vec<u32>, Box<dyn Error>> {
    let mut levels = vec![UNSEEN; graph.vertices.len()];
    // Queues: how many there are, and pointers to vertices.
    let mut queues = [(); 2].map(|()| vec![0u64; 1 + graph.vertices.len()]);
    levels[0] = 0;
    queues[0][..2].copy_from_slice(&[1, graph.vertices.as_ptr() as u64]);
    for level in 1.. {
        let [frontier, found] = &mut queues;
        let count = frontier[0];
        if count == 0 {
            break;
        }
        found[0] = 0;
        let step = Step {
            vertices: graph.vertices.as_ptr() as u64,
            levels: levels.as_mut_ptr() as u64,
            level,
            frontier: frontier.as_ptr() as u64 + 8,
            found: found.as_mut_ptr() as u64,
        };
        // Two thirds for the one with more memory.
        let split = count.div_ceil(3) * 2;
        let parts = [0..split.min(count), split.min(count)..count];
        let jobs = devices.iter().zip(parts).map(|(device, part)| {
            let first = part.start;
            let kernel =
                move |lane: &Lane, items: Range<u64>| expand(lane, items.start + first..items.end + first, step);
            // SAFETY: the graph, the levels and the queues stay, and the CPU uses none of them before the jobs are done.
            unsafe { device.launch(part.end - part.start, kernel) }
        });
        for job in jobs.collect::<Result<Vec<_>, _>>()? {
            job.wait()?;
        }
        queues.swap(0, 1);
    }
    Ok(levels)
}

/// What `--vertices` says.
fn vertices() -> Result<u64, String> {
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next()) {
        (None, _) => Ok(200_000),
        (Some("--vertices"), Some(n)) => match n.parse() {
            Ok(n @ 1000..=1_000_000_000) => Ok(n),
            _ => Err(format!("--vertices: {n:?} is no number from 1000 to 1000000000")),
        },
        _ => Err("usage: bfs [--vertices N]".into()),
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let graph = Graph::random(vertices()? as usize);
    let space = HEAP.space().ok_or("this machine manages no memory: see `peerspace doctor`")?;
    let devices = DEVICES.get().ok_or("the heap has no devices")?;
    let levels = search(&graph, devices)?;
    println!("{} vertices, {} edges", levels.len(), graph.edges.len());
    let reached = levels.iter().filter(|level| **level != UNSEEN);
    println!("{} reached in {} levels", reached.clone().count(), reached.max().map_or(0, |last| last + 1));
    if levels != graph.search() {
        return Err("the CPU's own search says something else".into());
    }
    println!("the CPU's own search says the same\n");

    let statistics = space.statistics();
    println!(
        "RAM in use was never more than {} of {} KiB",
        statistics.peak_bytes >> 10,
        statistics.limit_bytes >> 10
    );
    println!("device    memory KiB    faults     moved  replicated    remote   evicted  over the link KiB");
    for (device, s) in devices.iter().zip(&statistics.devices[1..]) {
        let m = s.mmu.ok_or("an accelerator has an MMU")?;
        let link = device.statistics();
        let link =
            link.bytes_in + link.bytes_out + link.peer_bytes_in + link.remote_bytes_read + link.remote_bytes_written;
        println!(
            "{:8} {:11} {:9} {:9} {:11} {:9} {:9} {:18}",
            s.name,
            device.bytes() >> 10,
            m.faults,
            m.moved,
            m.replicated,
            m.remote,
            m.evicted,
            link >> 10
        );
    }
    Ok(())
}
