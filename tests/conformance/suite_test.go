// Package conformance runs containerd's own snapshotter suite against plyd, through the client that
// containerd itself uses for a proxy snapshotter. Every test of the suite runs; none is excused.
package conformance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/errdefs"
	"github.com/containerd/containerd/pkg/testutil"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"google.golang.org/grpc"
)

// The suite's tests use the same keys in parallel, so each of them gets a daemon of its own.
func newSnapshotter(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
	program := os.Getenv("PLYD")
	if program == "" {
		return nil, nil, errors.New("PLYD must name the plyd program")
	}
	// Unix socket paths are limited to 107 bytes; the suite's own directories are long.
	state, err := os.MkdirTemp("", "ply-suite-")
	if err != nil {
		return nil, nil, err
	}
	socket := filepath.Join(state, "plyd.sock")
	log, err := os.Create(filepath.Join(state, "plyd.log"))
	if err != nil {
		return nil, nil, err
	}
	daemon := exec.Command(program, "--root", filepath.Join(root, "plywood"), "--state", filepath.Join(state, "state"),
		"--address", "unix://"+socket)
	daemon.Stdout, daemon.Stderr = log, log
	if err := daemon.Start(); err != nil {
		return nil, nil, err
	}
	stop := func() error {
		if err := daemon.Process.Signal(syscall.SIGTERM); err != nil {
			return err
		}
		if err := daemon.Wait(); err != nil {
			text, _ := os.ReadFile(log.Name())
			return fmt.Errorf("plyd did not end cleanly: %w\n%s", err, text)
		}
		return nil
	}

	dialCtx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	conn, err := grpc.DialContext(dialCtx, "unix://"+socket, grpc.WithBlock(), grpc.WithInsecure())
	if err != nil {
		text, _ := os.ReadFile(log.Name())
		return nil, nil, fmt.Errorf("plyd does not answer: %w\n%s", err, text)
	}
	sn := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "plywood")

	cleanup := func() error {
		err := removeAll(ctx, sn)
		conn.Close()
		if stopErr := stop(); err == nil {
			err = stopErr
		}
		if left := mountsBelow(state); err == nil && len(left) > 0 {
			err = fmt.Errorf("mounts left behind: %s", strings.Join(left, " "))
		}
		if err == nil {
			err = os.RemoveAll(state)
		}
		return err
	}
	return sn, cleanup, nil
}

// removeAll removes every snapshot, children first, as containerd's collector does.
func removeAll(ctx context.Context, sn snapshots.Snapshotter) error {
	for {
		var keys []string
		if err := sn.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
			keys = append(keys, info.Name)
			return nil
		}); err != nil {
			return err
		}
		if len(keys) == 0 {
			return nil
		}
		removed := 0
		for _, key := range keys {
			err := sn.Remove(ctx, key)
			switch {
			case err == nil:
				removed++
			case !errdefs.IsFailedPrecondition(err):
				return fmt.Errorf("remove %q: %w", key, err)
			}
		}
		if removed == 0 {
			return fmt.Errorf("none of %d snapshots can be removed", len(keys))
		}
	}
}

func mountsBelow(dir string) []string {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return []string{err.Error()}
	}
	var found []string
	for _, line := range strings.Split(string(text), "\n") {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			found = append(found, f[4])
		}
	}
	return found
}

func TestPlywood(t *testing.T) {
	testutil.RequiresRoot(t)
	testsuite.SnapshotterSuite(t, "plywood", newSnapshotter)
}
