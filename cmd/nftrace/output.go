package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/nftrace/nftrace/pkg/events"
	"github.com/nftrace/nftrace/pkg/render"
)

// output is where the data goes. Whole packets are buffered for a moment; flush
// writes them.
type output struct {
	render.Renderer
	w     io.Writer
	buf   []byte
	ends  []int    // of the packets in buf
	file  *os.File // nil for standard output
	name  string
	made  bool // the file was not there before
	pipe  int  // standard output's descriptor where it is a pipe, else -1
	ended bool // the pipe's reader went away
	// nowhere is set where standard output may have been closed: Go's runtime opens /dev/null for it, as some
	// do on purpose, who are not kept from it. A shell's > /dev/null cannot be read.
	nowhere bool

	stalls    bool            // a write may wait for ever: it is no regular file
	now       <-chan struct{} // closed when nothing is to be waited for any more
	unwritten uint64          // packets that were not written, for that or for an error
}

// bufSize is how many bytes are in the buffer when it is written, or more: packets are not
// cut. Few large writes cost less than many, as others than a regular file get (write): Go's runtime
// polls every 20 µs for a while when a thread was in a system call for long.
const bufSize = 256 << 10

var devNull = unix.Mkdev(1, 3)

// openOutput checks at once that the file can be written. Nothing in it changes before
// begin: a run that cannot start leaves it as it was.
func openOutput(c *config, stdout io.Writer) (*output, error) {
	o := &output{name: "standard output", pipe: -1, stalls: true}
	o.w = stdout
	if c.output != "" && c.output != "-" {
		f, err := os.OpenFile(c.output, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
		o.made = err == nil
		if errors.Is(err, fs.ErrExist) {
			f, err = os.OpenFile(c.output, os.O_WRONLY, 0)
			if errors.Is(err, fs.ErrNotExist) { // a link to a file that is not there yet
				f, err = os.OpenFile(c.output, os.O_WRONLY|os.O_CREATE, 0o644)
			}
		}
		if err != nil {
			return nil, fmt.Errorf("-o %w", whyNoFile(c.output, err))
		}
		o.file, o.name, o.w = f, c.output, f
		if st, err := f.Stat(); err == nil {
			o.stalls = !st.Mode().IsRegular()
		}
	} else if f, ok := stdout.(*os.File); ok {
		var st unix.Stat_t
		mode, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
		if err == nil && mode&unix.O_ACCMODE == unix.O_RDONLY {
			return nil, errors.New("standard output is open for reading only: redirect it (> FILE), or give -o FILE")
		}
		if unix.Fstat(int(f.Fd()), &st) == nil {
			o.stalls = st.Mode&unix.S_IFMT != unix.S_IFREG
			switch {
			case st.Mode&unix.S_IFMT == unix.S_IFIFO:
				o.pipe = int(f.Fd())
			case st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == devNull:
				o.nowhere = mode&unix.O_ACCMODE == unix.O_RDWR
			}
		}
	}
	return o, nil
}

// newRenderer is that of a format, for a terminal in colours; logsAE is as trace.Tracer has it.
func newRenderer(format string, terminal, logsAE bool) render.Renderer {
	switch format {
	case "trace":
		return render.NewTrace(render.TraceOptions{AE: logsAE})
	case "json":
		return render.NewJSON()
	}
	return render.NewTree(render.TreeOptions{Color: terminal && os.Getenv("NO_COLOR") == ""})
}

// begin empties the file, for there will be packets.
func (o *output) begin() error {
	if o.file == nil {
		return nil
	}
	st, err := o.file.Stat()
	if err == nil && st.Mode().IsRegular() {
		err = o.file.Truncate(0)
	}
	if err != nil {
		return fmt.Errorf("-o %w", whyNoFile(o.name, err))
	}
	o.made = false
	return nil
}

// abandon closes the output of a run that did not begin.
func (o *output) abandon() {
	if o.file == nil {
		return
	}
	if o.made {
		os.Remove(o.name)
	}
	o.file.Close()
}

// gone tells whether the reader of a pipe went away. Without asking, nftrace would
// know only when it has something to write.
func (o *output) gone() bool {
	if o.pipe >= 0 && !o.ended {
		fds := []unix.PollFd{{Fd: int32(o.pipe)}}
		n, err := unix.Poll(fds, 0)
		o.ended = err == nil && n > 0 && fds[0].Revents&unix.POLLERR != 0
	}
	return o.ended
}

// journey prints one.
func (o *output) journey(j *events.Journey) error {
	o.buf = o.Append(o.buf, j)
	o.ends = append(o.ends, len(o.buf))
	if len(o.buf) < bufSize {
		return nil
	}
	return o.flush()
}

func (o *output) flush() error {
	if len(o.buf) == 0 {
		o.ends = o.ends[:0] // of packets that met no rule
		return nil
	}
	n, err := o.write()
	if err != nil {
		for _, end := range o.ends {
			if end > n {
				o.unwritten++
			}
		}
		if !errors.Is(err, errNow) {
			o.cut(n)
		}
	}
	o.buf, o.ends = o.buf[:0], o.ends[:0]
	if err != nil {
		return o.writeError(err)
	}
	return nil
}

// errNow is returned where something was left undone, for nftrace is to end at once.
var errNow = errors.New("to end at once")

// atomicWrite is how many bytes a pipe takes as a whole or not at all (PIPE_BUF).
const atomicWrite = 4 << 10

// endsNow tells whether nftrace is to end at once.
func (o *output) endsNow() bool {
	select {
	case <-o.now:
		return true
	default:
		return false
	}
}

// write writes what is in the buffer, and returns how much of it was. It does not wait for a reader that
// stands still once nftrace is to end at once; what is larger than atomicWrite may be cut then.
func (o *output) write() (int, error) {
	if !o.stalls || o.now == nil {
		return o.w.Write(o.buf)
	}
	var written atomic.Int64
	done := make(chan error, 1)
	go func(b []byte, ends []int) {
		at := 0
		for i, end := range ends {
			if i+1 < len(ends) && ends[i+1]-at <= atomicWrite || end == at {
				continue
			}
			if o.endsNow() {
				done <- errNow
				return
			}
			n, err := o.w.Write(b[at:end])
			written.Add(int64(n))
			if err != nil {
				done <- err
				return
			}
			at = end
		}
		done <- nil
	}(o.buf, o.ends)
	var err error
	select {
	case err = <-done:
	case <-o.now:
		err = errNow
	}
	if errors.Is(err, errNow) {
		o.buf, o.ends = nil, slices.Clone(o.ends) // they may be in use still
	}
	return int(written.Load()), err
}

// cut takes the last packet from the file again where only a part of it could be written: whoever reads
// the file does not stumble over it. written is how much of the buffer is there.
func (o *output) cut(written int) {
	if o.file == nil {
		return // others may write there, too
	}
	whole := 0
	for _, end := range o.ends {
		if end <= written {
			whole = end
		}
	}
	if at, err := o.file.Seek(0, io.SeekCurrent); err == nil {
		o.file.Truncate(at - int64(written-whole)) // of a device or a pipe there is none
	}
}

// writeError says which output could not be written, and why.
func (o *output) writeError(err error) error {
	switch {
	case errors.Is(err, unix.EPIPE), errors.Is(err, errNow):
		return err
	case errors.Is(err, unix.ENOSPC):
		return fmt.Errorf("write to %s: %w", o.name, unix.ENOSPC)
	}
	var pe *fs.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	return fmt.Errorf("write to %s: %w", o.name, err)
}

func (o *output) close() error {
	err := o.flush()
	if o.file != nil {
		if cerr := o.file.Close(); err == nil && cerr != nil {
			err = o.writeError(cerr)
		}
	}
	return err
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
