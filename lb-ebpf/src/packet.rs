//! The only pointer arithmetic: bounds-checked reads and writes of a frame's linear bytes.
//!
//! Headers are byte arrays in the program and words on the wire: a value whose size is a multiple of four (two) is
//! read and written by words (halfwords), as C programs do by casting to `struct iphdr *`. The BPF target has no
//! trap on misaligned packet accesses (the verifier rejects them where the machine would); with byte alignment LLVM
//! would load an address in four instructions.

/// A value as words of the frame.
#[repr(C, align(4))]
#[derive(Clone, Copy)]
struct Words<T>(T);

/// A value as halfwords of the frame.
#[repr(C, align(2))]
#[derive(Clone, Copy)]
struct Halfwords<T>(T);

/// Both Ethernet addresses, destination first.
#[repr(C, align(4))]
#[derive(Clone, Copy)]
pub struct Macs(pub [u8; 12]);

impl Macs {
    /// Back to the sender.
    #[inline(always)]
    pub fn swapped(self) -> Self {
        let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5] = self.0;
        Self([s0, s1, s2, s3, s4, s5, d0, d1, d2, d3, d4, d5])
    }
}

/// The linear bytes of a frame as they are now; anything that may move them needs a new value.
#[derive(Clone, Copy)]
pub struct Bytes {
    start: usize,
    end: usize,
}

impl Bytes {
    /// Takes the hook's `data` and `data_end`.
    #[inline(always)]
    pub fn new(start: usize, end: usize) -> Self {
        Self { start, end }
    }

    /// Reads a plain value at a byte offset, or nothing if the frame is too short.
    #[inline(always)]
    pub fn read<T: Copy>(&self, offset: usize) -> Option<T> {
        let at = self.start + offset;
        if at + size_of::<T>() > self.end {
            return None;
        }
        // SAFETY: inside the frame by the check above; T is made of bytes; see the module's words on alignment.
        unsafe {
            Some(match size_of::<T>() % 4 {
                0 => (*(at as *const Words<T>)).0,
                2 => (*(at as *const Halfwords<T>)).0,
                _ => *(at as *const T),
            })
        }
    }

    /// Writes a plain value at a byte offset; `None` if the frame is too short.
    #[inline(always)]
    pub fn write<T: Copy>(&self, offset: usize, value: T) -> Option<()> {
        let at = self.start + offset;
        if at + size_of::<T>() > self.end {
            return None;
        }
        // SAFETY: as in `read`.
        unsafe {
            match size_of::<T>() % 4 {
                0 => *(at as *mut Words<T>) = Words(value),
                2 => *(at as *mut Halfwords<T>) = Halfwords(value),
                _ => *(at as *mut T) = value,
            }
        }
        Some(())
    }

    /// Number of linear bytes.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.end - self.start
    }
}
